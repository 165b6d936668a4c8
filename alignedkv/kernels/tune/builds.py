"""Candidates compiled in parallel, ahead of their measurement."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self

from alignedkv.errors import CompileError
from alignedkv.kernels.codegen import STEP_FILES
from alignedkv.kernels.compile import Resources, build
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.spec import DecodeSpec


class Builds:
    """Compiles the kernels of a step for many configurations at once, into the disk cache.

    Parameters
    ----------
    spec : DecodeSpec
    arch : str
        Such as "sm_90".
    workers : int, optional
        Processes; default: all cores that this process may use.
    """

    def __init__(self, spec: DecodeSpec, arch: str, *, workers: int | None = None) -> None:
        self._spec, self._arch = spec, arch
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool = self._make_pool(self._workers)
        self._futures: dict[DecodeConfig, Future[dict[str, Resources]]] = {}

    def announce(self, configs: Sequence[DecodeConfig]) -> None:
        """Begin to compile, in this order, what has not been announced before."""
        for config in configs:
            if config not in self._futures:
                self._futures[config] = self._submit(config)

    def result(self, config: DecodeConfig) -> dict[str, Resources]:
        """What the kernels of a configuration take, by kernel name; waits for the compiler.

        Raises
        ------
        CompileError
            If it does not compile, or the compiler died of it.
        """
        self.announce([config])
        try:
            return self._futures[config].result()
        except BrokenProcessPool:
            return self._build_alone(config)

    def close(self) -> None:
        """Drop what is still waiting."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, config: DecodeConfig) -> Future[dict[str, Resources]]:
        try:
            return self._pool.submit(compile_step, self._spec, config, self._arch)
        except BrokenProcessPool:
            self._pool = self._make_pool(self._workers)
            return self._submit(config)

    def _build_alone(self, config: DecodeConfig) -> dict[str, Resources]:
        """Build in a pool of its own, after a compiler that died took all others with it."""
        self.close()
        self._pool = self._make_pool(self._workers)
        self._futures = {c: f for c, f in self._futures.items() if f.done() and not f.exception()}
        with self._make_pool(1) as alone:
            future = self._futures[config] = alone.submit(
                compile_step, self._spec, config, self._arch
            )
            try:
                return future.result()
            except BrokenProcessPool:
                raise CompileError(f"the compiler dies of {config}") from None

    def _make_pool(self, workers: int) -> ProcessPoolExecutor:
        # Spawned: the compiler's threads and locks do not survive a fork.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, mp_context=context)


def compile_step(spec: DecodeSpec, config: DecodeConfig, arch: str) -> dict[str, Resources]:
    """Compile all files of a step; what its kernels take, by kernel name.

    Raises
    ------
    CompileError
        As `compile.build` does.
    """
    taken: dict[str, Resources] = {}
    for file in STEP_FILES:
        taken |= build(spec, config, file, arch).resources
    return taken
