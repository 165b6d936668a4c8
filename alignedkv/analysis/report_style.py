"""The page that `report` fills: its CSS and its words, as a `string.Template`."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$variables
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem clamp(0.9rem, 3vw, 2rem) 3rem; max-width: 76rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
p { margin: 0 0 0.75rem; max-width: 46rem; }
sup { font-size: 0.72em; line-height: 0; }
.cards { display: grid; gap: 1rem; margin: 1.5rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.card, figure { border: 1px solid var(--grid); border-radius: 0.6rem; padding: 1rem; margin: 0; }
.figure { font-size: 2.2rem; font-weight: 650; line-height: 1.1; margin: 0;
  color: var(--series-0); }
.of { color: var(--muted); margin: 0.1rem 0 0.75rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure svg { display: block; width: 100%; height: auto; max-width: 32rem; margin: 0 auto; }
figure svg text { font-family: inherit !important; }
figcaption, .note { color: var(--muted); font-size: 0.88rem; margin-top: 0.6rem; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--grid); text-align: right;
  white-space: nowrap; font-weight: 400; }
th:first-child, .facts td { text-align: left; }
thead th { color: var(--muted); font-size: 0.85rem; vertical-align: bottom; }
.card th, .card td { padding: 0.15rem 0; border: 0; font-size: 0.92rem; }
.card th, .facts th { color: var(--muted); }
.facts th, .facts td { white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
.facts th { width: 11rem; }
tbody tr:last-child > * { border-bottom: 0; }
@media (max-width: 40rem) {
  .scroll th, .scroll td { padding: 0.3rem 0.35rem; font-size: 0.85rem; }
  .scroll th:first-child { white-space: normal; }
}
dt { font-weight: 600; } dd { margin: 0 0 0.6rem; max-width: 46rem; }
footer { color: var(--muted); font-size: 0.85rem; margin-top: 2.5rem; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$lead</p>
</header>
<section class="cards" aria-label="Summary">
$cards
</section>
<h2>Pictures</h2>
<section class="figures">
$figures
</section>
<h2>Beside other schemes</h2>
$schemes
<h2>Layer by layer</h2>
$layers
<h2>How to read this</h2>
<p>A cached row of keys or values is stored as a scale and 16-bit numbers cut into planes, most
significant first. For each token only the planes are read that the sum can use: a row with a small
softmax weight may be wrong by more than one with a large weight. Errors, bounds and tolerances are
relative to the largest component of the exact attention output, which was computed in 64-bit
arithmetic from the inputs as given. Bytes are of the rows that a query sees, as a share of 16 bits
per element. Row scales, 16 bits for each row of keys and of values, are left out of them except
where other schemes, which have scales too, stand beside.</p>
<dl>$bounds</dl>
<h2>This run</h2>
<table class="facts"><tbody>$facts</tbody></table>
<footer>alignedkv $version</footer>
</body>
</html>
"""
