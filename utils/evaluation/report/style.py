"""The report's style sheet: one column, a serif for what is said and a sans for what is shown, one accent colour.

Every pair of text and ground has a contrast of 4.5 or more in both colour schemes (tests/test_report.py computes it).
"""

LIGHT = {
    "ground": "#fafaf7",
    "raised": "#ffffff",
    "ink": "#1c1e21",
    "muted": "#5c6066",
    "rule": "#dcdcd4",
    "accent": "#0b5f66",
    "faint": "#9fc4c6",
    "warn-ground": "#fdf1de",
    "warn-ink": "#7a3e00",
    "note-ground": "#eef1ee",
    "good-ground": "#e6f2ea",
    "good-ink": "#14532d",
}
DARK = {
    "ground": "#15171a",
    "raised": "#1d2024",
    "ink": "#e8e8e3",
    "muted": "#a2a6ab",
    "rule": "#34383d",
    "accent": "#7cc7cc",
    "faint": "#2f5558",
    "warn-ground": "#33260f",
    "warn-ink": "#f3c88b",
    "note-ground": "#22262a",
    "good-ground": "#16291d",
    "good-ink": "#a3d9b5",
}
TEXT_ON_GROUND = (
    *(("ink", "ground"), ("ink", "raised"), ("muted", "ground"), ("muted", "raised"), ("accent", "ground")),
    *(("accent", "raised"), ("warn-ink", "warn-ground"), ("ink", "warn-ground"), ("ink", "note-ground")),
    *(("muted", "note-ground"), ("good-ink", "good-ground"), ("ink", "good-ground")),
)

RULES = """
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 72px; }
h1, h2, h3, .say { font-family: "Iowan Old Style", Palatino, "Palatino Linotype", "Book Antiqua", Georgia,
  "Noto Serif", "Liberation Serif", serif; font-weight: 600; line-height: 1.25; }
h1 { font-size: 34px; margin: 4px 0 10px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 24px; margin: 56px 0 6px; padding-top: 20px; border-top: 1px solid var(--rule); }
h3 { font-size: 18px; margin: 28px 0 8px; overflow-wrap: anywhere; }
p { margin: 6px 0 12px; max-width: 72ch; }
.kicker, .meta { color: var(--muted); font-size: 14px; margin: 0; }
.role { margin: 32px 0 0; } .role + h3 { margin-top: 12px; }
.kicker { letter-spacing: 0.04em; }
a { color: var(--accent); text-underline-offset: 3px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 3px; }
nav { margin: 18px 0 0; font-size: 15px; display: flex; flex-wrap: wrap; gap: 4px 20px; }
.say { font-size: 21px; font-weight: 400; line-height: 1.45; max-width: 62ch; margin: 22px 0 6px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0; }
.tile { background: var(--raised); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; }
.tile b { display: block; font-size: 28px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 14px; display: block; }
.flags { list-style: none; margin: 16px 0 0; padding: 0; display: grid; gap: 10px; }
.flags li { border-left: 4px solid var(--muted); background: var(--note-ground); border-radius: 0 8px 8px 0;
  padding: 12px 16px; max-width: 82ch; }
.flags .warning { border-color: var(--warn-ink); background: var(--warn-ground); }
.flags .good { border-color: var(--good-ink); background: var(--good-ground); }
.flags b { display: block; }
.warning b { color: var(--warn-ink); } .good b { color: var(--good-ink); }
.scroller { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers { width: 100%; font-size: 15px; margin: 12px 0; }
.numbers th, .numbers td { text-align: left; vertical-align: top; padding: 9px 14px 9px 0;
  border-bottom: 1px solid var(--rule); }
.numbers thead th { color: var(--muted); font-weight: 500; font-size: 14px; vertical-align: bottom; }
.numbers tbody th { font-weight: 600; min-width: 210px; }
.settings tbody th { min-width: 120px; }
.numbers small { display: block; color: var(--muted); font-weight: 400; font-size: 13px; }
.numbers .range { white-space: nowrap; }
.numbers .absent { color: var(--muted); }
.grid th, .grid td { padding: 0 8px 8px 0; }
.grid thead th { color: var(--muted); font-weight: 400; font-size: 13px; padding-bottom: 4px; }
.grid tbody th { text-align: left; font-weight: 500; font-size: 14px; padding-right: 14px; width: 104px;
  min-width: 88px; position: sticky; left: 0; background: var(--ground); z-index: 1; }
.grid td { color: var(--muted); font-size: 13px; text-align: center; vertical-align: top; }
.grid img, .photos img { display: block; width: 176px; height: auto; border-radius: 5px; background: var(--rule); }
.photos { display: flex; gap: 8px; margin: 0; padding: 0; list-style: none; width: max-content; }
.photos li { color: var(--muted); font-size: 13px; text-align: center; max-width: 176px; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 16px;
  margin: 14px 0; }
.chart { margin: 0; background: var(--raised); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 14px 6px; max-width: 520px; }
.chart figcaption { font-size: 14px; } .chart figcaption span { color: var(--muted); }
.chart svg { display: block; width: 100%; height: auto; margin-top: 6px; }
.chart text { fill: var(--muted); font-size: 11px; }
.chart .y-label { text-anchor: end; dominant-baseline: middle; }
.chart .rule { stroke: var(--rule); stroke-width: 1; }
.chart .line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.chart .raw { stroke: var(--faint); stroke-width: 1; }
.chart circle { fill: var(--accent); } .chart .whisker { stroke: var(--faint); stroke-width: 3; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 500; padding: 4px 0; }
pre { background: var(--raised); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; margin: 12px 0;
  overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.settings td, .settings th { font-size: 14px; } .settings td { overflow-wrap: anywhere; }
footer { margin-top: 56px; color: var(--muted); font-size: 14px; }
@media (max-width: 640px) {
  main { padding: 24px 16px 48px; } h1 { font-size: 27px; } .say { font-size: 18px; }
  .grid img, .photos img { width: 124px; } .photos li { max-width: 124px; }
  .grid tbody th { min-width: 76px; width: 76px; padding-right: 8px; font-size: 13px; }
  .numbers tbody th { min-width: 136px; } .settings tbody th { min-width: 104px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile b { font-size: 24px; }
}
@media print { nav { display: none; } .scroller { overflow: visible; } }
"""


def style_sheet() -> str:
    """The whole style sheet."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{RULES}"
