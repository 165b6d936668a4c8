"""The runtime: what a Hugging Face model sees once it is patched.

>>> from alignedkv import runtime
>>> runtime.patch(model)
>>> model.generate(**inputs, max_new_tokens=100)
>>> runtime.report(model)
>>> runtime.unpatch(model)
"""

from alignedkv.runtime.cache import AlignedKVCache
from alignedkv.runtime.forecast import Forecast, forecast
from alignedkv.runtime.patch import patch, patched, report, unpatch
from alignedkv.runtime.request import OnMiss, Request, make_request

__all__ = [
    "AlignedKVCache",
    "Forecast",
    "OnMiss",
    "Request",
    "forecast",
    "make_request",
    "patch",
    "patched",
    "report",
    "unpatch",
]
