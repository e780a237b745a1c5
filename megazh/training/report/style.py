"""The style sheet of a report: light or dark as the reader prefers, for wide and narrow screens and for paper."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #666; --bad: #b30000; }
@media (prefers-color-scheme: dark) { :root { --dim: #aaa; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 15px/1.6 system-ui, "Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei",
  "WenQuanYi Micro Hei", sans-serif; max-width: 76em; margin: 0 auto; padding: 1.5em 1em 4em; overflow-wrap: anywhere; }
h1 { font-size: 1.8em; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25em; margin: 2em 0 .6em; padding-bottom: .2em; border-bottom: 1px solid var(--line); }
h3 { font-size: 1em; margin: 1.4em 0 .3em; }
small, .state, figcaption, th, dt, summary { color: var(--dim); }
small { font-size: .85em; font-weight: normal; }
.problem { color: var(--bad); }
p.problem { border-left: 3px solid; padding-left: .8em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5em, 1fr)); gap: .6em; margin-top: 1em; }
.tiles div { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .5em .8em; }
.tiles b { display: block; font-size: 1.3em; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--dim); font-size: .85em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26em), 1fr)); gap: 1.2em; }
.columns { columns: 24em; column-gap: 2em; } .columns > div { break-inside: avoid; margin-bottom: 1.2em; }
.columns h3 { margin-top: .2em; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2em; }
figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93em; }
th, td { text-align: left; vertical-align: top; padding: .25em .9em .25em 0; }
th { font-weight: 600; } thead th { border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--soft); }
th, .number { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.sample { white-space: pre-wrap; margin: 0; max-width: 60em; min-width: 12em; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1.2em; margin: .8em 0; }
dt { font-weight: 600; } dd { margin: 0; }
details { margin: .3em 0; } summary { cursor: pointer; }
@media (max-width: 34em) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5em; } }
@media print { body { max-width: none; } details::details-content { content-visibility: visible; } }
"""
