"""What the page of benchmarks needs beyond the style sheet of reports: more hues, bars, labels in plots."""

STYLE = """
:root { --violet: #7a5195; --green: #2f8f7b; --ochre: #b78a0c; --grey: #8a847a; }
@media (prefers-color-scheme: dark) { :root {
  --violet: #b99ad6; --green: #67c4ad; --ochre: #dcb950; --grey: #8d867b; } }
.copper { --c: var(--copper); } .blue { --c: var(--blue); } .violet { --c: var(--violet); }
.green { --c: var(--green); } .ochre { --c: var(--ochre); } .grey { --c: var(--grey); } .ink { --c: var(--ink); }
main { max-width: 1120px; }
header p { max-width: 96ch; }
h2 { font-size: 22px; letter-spacing: -0.012em; margin: 60px 0 8px; }
h3 { font-size: 16px; font-weight: 620; margin: 30px 0 10px; }
h3 + .soft { margin-top: -6px; }
.machine { border-top: 1px solid var(--line); margin-top: 72px; padding-top: 8px; }
.machine:first-of-type { border-top: 0; margin-top: 0; padding-top: 0; }
.tile b { font-size: 26px; color: var(--copper); } .tile span { display: block; line-height: 1.4; }
.facts p { margin-bottom: 6px; } .facts { margin-bottom: 18px; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
  background: var(--code); border-radius: 6px; padding: 2px 8px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
nav { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 16px 0 -20px; font-size: 14px; }
nav a { text-decoration: none; border-bottom: 1px solid currentColor; }
.charts + *, h3 + .charts { margin-top: 12px; } .charts + h3 { margin-top: 30px; }
.notes { margin: 0 0 16px; padding: 10px 16px; background: var(--code); border-radius: 10px; font-size: 14px; }
.notes p { margin: 2px 0; }
.chart { padding: 18px 20px 14px; container-type: inline-size; }
.towers { display: block; columns: 2; column-gap: 16px; margin-bottom: 16px; }
.towers > * { break-inside: avoid; margin-bottom: 16px; } .towers details .chart { margin-top: 8px; }
figcaption { font-size: 15px; margin-bottom: 6px; }
.key::before { background: var(--c); } .key.pale::before { opacity: 0.6; }
.key.dotted::before { background: repeating-linear-gradient(90deg, var(--c) 0 2px, transparent 2px 5px); }
.key.dashed::before { background: repeating-linear-gradient(90deg, var(--c) 0 5px, transparent 5px 8px); }
.key.open::before { width: 9px; height: 9px; border: 2.5px solid var(--c); border-radius: 50%; background: none;
  vertical-align: -1px; } .key.open.dotted::before { border-style: dotted; }
.lead { font-size: 13px; line-height: 1.5; color: var(--soft); max-width: 86ch; }
.unit { font-size: 12px; color: var(--soft); margin: 0; text-align: right; }
.unit.up { text-align: left; margin: 12px 0 12px; }
.bars { --name: min(var(--wide-name), 32cqi); --value: var(--wide-value); position: relative; margin-top: 12px; }
.bars .back { position: absolute; left: var(--name); top: 0; width: calc(100% - var(--name) - var(--value));
  height: calc(100% - 42px); overflow: visible; }
.bars path { fill: none; vector-effect: non-scaling-stroke; }
.bars .grid { stroke: var(--line); } .bars .origin { stroke: var(--soft); }
.bar { position: relative; display: grid; align-items: center; font-size: 13px; line-height: 1.3;
  grid-template-columns: var(--name) minmax(0, 1fr) var(--value); }
.bar .name { grid-column: 1; grid-row: 1; padding: 3px 14px 3px 0; overflow-wrap: anywhere; }
.bar .track { grid-column: 2; grid-row: 1; height: 34px; }
.half .bar .track { height: 26px; }
.name small { display: block; font-size: 12px; }
.bar .value { grid-column: 3; grid-row: 1; display: flex; justify-content: flex-end; align-items: baseline;
  text-align: right; white-space: nowrap; }
.bar .value b { font-weight: 620; }
.bar .value i { font-style: normal; font-size: 12px; color: var(--soft); width: var(--note); flex: none; }
.bar .state { grid-column: 2 / 4; grid-row: 1; color: var(--soft); padding: 6px 0 6px 8px; font-size: 12px;
  overflow-wrap: anywhere; background: var(--card); }
.bar svg { display: block; width: 100%; height: 100%; overflow: visible; }
.fill { fill: var(--c); } .fill.pale { opacity: 0.55; }
.bars .whisker { stroke: var(--ink); stroke-width: 1.5; }
.bars .mark { stroke: var(--ink); stroke-width: 2.5; }
.bars .samples { stroke: var(--c); stroke-width: 5; stroke-linecap: round; opacity: 0.55; }
.group { position: relative; font-size: 12px; padding: 12px 0 3px; color: var(--soft); }
.group b { font-weight: 560; background: var(--card); padding-right: 8px; overflow-wrap: anywhere; }
.bars > svg + .group { padding-top: 0; }
.ticks { position: relative; height: 22px; margin: 0 var(--value) 0 var(--name); }
.ticks span { position: absolute; top: 6px; transform: translateX(-50%); font-size: 12px; line-height: 1;
  color: var(--soft); white-space: nowrap; }
.bars .unit { height: 20px; line-height: 20px; white-space: nowrap; }
.points .plot { margin-bottom: 26px; margin-left: 44px; }
.full .points .plot { height: 400px; } .half .points .plot { height: 260px; }
.plot path { stroke: var(--c); }
.plot .grid { stroke: var(--line); stroke-width: 1; } .plot .level { stroke: var(--bad); stroke-dasharray: 2 4; }
.plot .line.dotted { stroke-dasharray: 1 4; }
.plot .dashed { stroke-dasharray: 7 5; stroke-width: 1.5; } .plot .dots { stroke-width: 9; }
.plot path.pale { opacity: 0.6; } .plot .hole { stroke: var(--card); stroke-width: 4.5; stroke-linecap: round; }
.plot .above { fill: var(--line); opacity: 0.35; stroke: none; }
.roofline .line.grey { stroke-width: 1; opacity: 0.6; } .roofline .dots.grey { stroke-width: 7; }
.roofline .hole { stroke-width: 4; }
.model .plot .line { stroke-dasharray: 7 5; }
.plot .label { color: var(--ink); }
.plot .label.level { color: var(--bad); }
.e { transform: translate(9px, -50%); } .w { transform: translate(calc(-100% - 9px), -50%); }
.n { transform: translate(-50%, calc(-100% - 7px)); } .s { transform: translate(-50%, 7px); }
.ne { transform: translate(6px, calc(-100% - 4px)); } .se { transform: translate(6px, 4px); }
.nw { transform: translate(calc(-100% - 6px), calc(-100% - 4px)); }
.sw { transform: translate(calc(-100% - 6px), 4px); }
.up.right { transform: translate(0, calc(-100% - var(--rise))); }
.up.left { transform: translate(-100%, calc(-100% - var(--rise))); }
.down.right { transform: translate(0, var(--rise)); }
.down.left { transform: translate(-100%, var(--rise)); }
.label.up::before, .label.down::before { content: ""; position: absolute; height: calc(var(--rise) - 5px);
  border-left: 1px solid var(--soft); }
.label.up::before { top: 100%; } .label.down::before { bottom: 100%; }
.label.right::before { left: 0; } .label.left::before { right: 0; }
.on.nw { transform: translate(4px, calc(-100% - 3px)); } .on.sw { transform: translate(4px, 3px); }
.on.ne { left: auto !important; right: 4px; transform: translateY(calc(-100% - 3px)); }
.on.se { left: auto !important; right: 4px; transform: translateY(3px); }
.narrow { display: none; }
details.tables { margin-top: 18px; } .tables h4 { font-size: 14px; font-weight: 620; margin: 18px 0 8px; }
.tables ul { margin: 8px 0 0; padding-left: 20px; font-size: 13px; color: var(--soft); }
.missing { font-size: 13px; color: var(--soft); }
.missing ul { margin: 4px 0; padding-left: 20px; columns: 2; column-gap: 32px; overflow-wrap: anywhere; }
@container (max-width: 440px) {
  .bars { --name: 0px; --value: 0px; }
  .bar { grid-template-columns: minmax(0, 1fr) auto; padding-top: 6px; }
  .bar .name { grid-column: 1; justify-self: start; padding-right: 8px; }
  .bar .value { grid-column: 2; align-self: start; padding: 3px 0 0 8px; }
  .bar .name, .bar .value { background: var(--card); }
  .bar .value i { width: auto; margin-left: 8px; }
  .bar .track { grid-column: 1 / -1; grid-row: 2; height: 24px; }
  .bar .state { grid-column: 1 / -1; grid-row: 2; padding: 0 0 4px; }
  .bars .unit { white-space: normal; height: auto; min-height: 20px; line-height: 1.4; } }
@media (max-width: 760px) {
  .chart { padding: 14px 14px 12px; }
  .towers { columns: 1; }
  .full .points .plot { height: 330px; } .half .points .plot { height: 240px; }
  .points .plot { margin-right: 4px; margin-left: 40px; }
  .plot .wide { display: none; } .plot .narrow { display: inline; } .tile b { font-size: 21px; }
  .missing ul { columns: 1; } }
@media print { .chart, .notes { break-inside: avoid; } details::details-content { content-visibility: visible; } }
"""
