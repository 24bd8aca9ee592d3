"""The style sheet of reports: light, dark, narrow, and on paper."""

CSS = """
:root { color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --muted: #59636e; --line: #d4dae1; --panel: #f5f7f9; --accent: #0b62c4;
  --pass: #17713a; --fail: #b3261e; --inconclusive: #7d5700; --untrusted: #7a2fa6; --skipped: #59636e;
  --c0: #0b62c4; --c1: #b6541c; --c2: #17713a; --c3: #7a2fa6; --c4: #8f2452; --c5: #59636e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161b; --ink: #e6eaef; --muted: #9fabb8; --line: #333c46; --panel: #1a2027; --accent: #79b4ff;
  --pass: #63c98a; --fail: #ff8f87; --inconclusive: #e3b34e; --untrusted: #cf9bf2; --skipped: #9fabb8;
  --c0: #79b4ff; --c1: #f0a070; --c2: #63c98a; --c3: #cf9bf2; --c4: #ef8bb4; --c5: #9fabb8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
body.wide { max-width: 1360px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.25rem; margin: 40px 0 2px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 24px 0 6px; }
p { margin: 6px 0; max-width: 75ch; }
.muted, .question { color: var(--muted); }
.top { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: baseline; justify-content: space-between; }
.chip { display: inline-block; border: 1px solid currentColor; border-radius: 4px; padding: 0 7px; font-size: .8rem;
  font-weight: 600; white-space: nowrap; overflow-wrap: normal; }
.v-pass { color: var(--pass); } .v-fail { color: var(--fail); } .v-inconclusive { color: var(--inconclusive); }
.v-untrusted { color: var(--untrusted); } .v-skipped, .v-none { color: var(--skipped); }
.gates { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px; margin: 16px 0; }
.gate { border: 1px solid var(--line); border-left: 4px solid currentColor; border-radius: 4px; padding: 10px 12px; }
.gate * { color: var(--ink); } .gate .chip { color: inherit; }
.gate.v-pass .chip { color: var(--pass); } .gate.v-fail .chip { color: var(--fail); }
.gate.v-inconclusive .chip { color: var(--inconclusive); } .gate.v-untrusted .chip { color: var(--untrusted); }
.gate.v-skipped .chip { color: var(--skipped); }
.gate h3 { margin: 0; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 8px;
  overflow-wrap: normal; }
.gate p { font-size: .85rem; color: var(--muted); }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: var(--page);
  background-clip: padding-box; }
.numbers td { white-space: nowrap; } .numbers td:first-child { white-space: normal; min-width: 7em; }
thead th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--line); white-space: nowrap; }
td .sub { display: block; color: var(--muted); font-size: .8rem; white-space: nowrap; }
td:first-child .sub { white-space: normal; }
td.words { text-align: left; min-width: 14em; }
ul { padding-left: 20px; margin: 6px 0; } li { margin: 3px 0; max-width: 80ch; }
.bad { color: var(--fail); }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
.chart { display: block; width: 100%; max-width: 720px; height: auto; margin: 12px 0; font-size: 13px; }
.chart text { fill: var(--ink); } .chart text.muted { fill: var(--muted); font-size: 12px; }
.chart .axis { stroke: var(--muted); } .chart .grid { stroke: var(--line); }
.chart .edge { stroke: var(--muted); stroke-dasharray: 5 4; }
.chart .whisker, .chart .bar { stroke: currentColor; stroke-width: 2; } 
.chart .dot, .chart .arrow { fill: currentColor; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); }
.s4 { color: var(--c4); } .s5 { color: var(--c5); }
.s polyline { fill: none; stroke: currentColor; stroke-width: 2; }
.s .front { stroke-dasharray: 5 4; stroke-width: 1.5; }
.s circle { fill: currentColor; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); image-rendering: pixelated; }
pre { background: var(--panel); padding: 12px; border-radius: 4px; overflow-x: auto; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: minmax(8em, max-content) 1fr; gap: 2px 16px; }
dt { color: var(--muted); } dd { margin: 0; }
@media (max-width: 560px) { body { padding: 16px 12px 48px; } dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; }
  .chart { font-size: 17px; } .chart text.muted { font-size: 15px; } }
@media print { :root { color-scheme: light; --page: #fff; --ink: #000; --muted: #444; --line: #bbb; --panel: #f4f4f4;
    --accent: #000; --pass: #17713a; --fail: #b3261e; --inconclusive: #7d5700; --untrusted: #7a2fa6; --skipped: #444;
    --c0: #0b62c4; --c1: #b6541c; --c2: #17713a; --c3: #7a2fa6; --c4: #8f2452; --c5: #444; }
  body, body.wide { max-width: none; padding: 0; font-size: 10.5pt; } .scroll { overflow: visible; }
  th, td { padding: 3px 5px; } h2, h3 { break-after: avoid; } .gate, .chart, img, tr { break-inside: avoid; } }
"""
