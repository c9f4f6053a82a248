"""The style sheet of report.html: light and dark, from a phone to a wide screen, and on paper."""

STYLE = """
:root { color-scheme: light dark;
  --page: #faf9f7; --card: #ffffff; --ink: #1d1b18; --soft: #6b665e; --line: #e3dfd8; --code: #f2efea;
  --copper: #b4501f; --blue: #2f6690; --good: #2b7a4b; --bad: #b3352c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #161514; --card: #1f1d1b; --ink: #ece8e1; --soft: #a29b90; --line: #35312c; --code: #282522;
  --copper: #ec9460; --blue: #7fb4dc; --good: #7cc796; --bad: #f08b80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 80px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -0.005em; margin: 48px 0 14px; }
p { margin: 0 0 10px; }
.soft, small { color: var(--soft); }
a { color: var(--blue); }
.status { font-size: 13px; font-weight: 600; vertical-align: 5px; padding: 3px 10px; border-radius: 99px;
  margin-left: 10px; border: 1px solid currentColor; color: var(--soft); white-space: nowrap; letter-spacing: 0; }
.status.finished, .good { color: var(--good); } .status.failed, .bad { color: var(--bad); }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; background: var(--line);
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tile { background: var(--card); padding: 14px 16px 15px; min-width: 0; flex: 1 1 calc(88% / var(--columns)); }
.tile small { display: block; font-size: 13px; }
.tile b { display: block; font-size: 22px; font-weight: 620; line-height: 1.3; letter-spacing: -0.01em; }
.tile b i { font-style: normal; font-weight: 400; color: var(--soft); font-size: 17px; }
.tile span { font-size: 13px; color: var(--soft); }
.tile .good { color: var(--good); } .tile .bad { color: var(--bad); }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.chart { margin: 0; padding: 14px 18px 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; min-width: 0; }
.chart.full { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 14px; margin-bottom: 12px; }
figcaption b { font-weight: 620; margin-right: auto; }
.key { font-size: 13px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: 3px; background: currentColor; }
.key.blue::before { background: var(--blue); } .key.copper::before { background: var(--copper); }
.plot { position: relative; height: 150px; margin: 0 10px 22px 46px; }
.full .plot { height: 270px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; display: block; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.75; stroke-linejoin: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .blue { stroke: var(--blue); } .plot .copper { stroke: var(--copper); }
.plot .faint { opacity: 0.45; stroke-width: 1; }
.plot .dots { stroke-width: 7; stroke-linecap: round; }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--soft); white-space: nowrap; }
.plot .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 8px); transform: translateX(-50%); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 16px; border-top: 1px solid var(--line); }
thead th, tr:first-child > td, tbody:first-child tr:first-child > th { border-top: 0; }
thead + tbody tr:first-child > * { border-top: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
thead th { font-size: 13px; }
td { overflow-wrap: anywhere; }
.stack th { width: 240px; }
.figures td, .figures th { text-align: right; overflow-wrap: normal; white-space: nowrap; }
.figures td:first-child, .figures th:first-child { text-align: left; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin-bottom: 16px; }
.sample > div { padding: 14px 18px; min-width: 0; }
.answers { display: grid; grid-template-columns: 1fr 1fr; padding: 0 !important; border-top: 1px solid var(--line); }
.answers.three { grid-template-columns: 1fr 1fr 1fr; }
.answers > div { padding: 14px 18px; min-width: 0; border-left: 1px solid var(--line); }
.answers > div:first-child { border-left: 0; }
.answers small, .sample > div > small { display: block; font-size: 13px; margin-bottom: 4px; }
.answers .after small { color: var(--copper); font-weight: 600; }
pre { margin: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; unicode-bidi: plaintext; }
.block { background: var(--code); border-radius: 10px; padding: 14px 18px; }
.block pre { max-height: none; }
details { margin: 0 0 12px; }
summary { cursor: pointer; color: var(--blue); padding: 4px 0; }
.picture { display: block; width: 112px; border: 1px solid var(--line); shape-rendering: crispEdges; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 13px; color: var(--soft); }
@media (max-width: 760px) {
  main { padding: 24px 16px 56px; } h1 { font-size: 25px; } h2 { margin-top: 38px; }
  .tile { padding: 12px 12px 13px; flex-basis: 45%; } .tile b { font-size: 18px; }
  .tile b i { font-size: 15px; }
  .charts, .answers, .answers.three { grid-template-columns: 1fr; }
  .answers > div { border-left: 0; border-top: 1px solid var(--line); } .answers > div:first-child { border-top: 0; }
  .chart { padding: 12px 12px 10px; } .full .plot { height: 210px; } th, td { padding: 7px 12px; }
  .stack th { white-space: normal; width: 40%; } }
@media print { .plot, .sample, .tile { break-inside: avoid; } pre { max-height: none; } }
"""
