"""How a report looks: its style sheet, in a light and a dark theme, and the logo."""

PAGE_STYLE = """
:root{color-scheme:light dark;--bg:#f5f4f0;--card:#fff;--ink:#1b222c;--muted:#5c6673;--edge:#c4c7cb;--line:#e9e8e3;
--well:#f1f0ec;--even:#a9b4c0;--blue:#0b62b0;--sky:#7db3e0;--plum:#a2447f;--green:#00875f;--orange:#d0570a;
--tip:#1b222c;--tip-ink:#f4f5f7}
@media (prefers-color-scheme:dark){:root{--bg:#0f1318;--card:#181e25;--ink:#e8ebef;--muted:#9ca7b4;--edge:#465161;
--line:#28303a;--well:#212932;--even:#5d6b7b;--blue:#62b1ff;--sky:#34699c;--plum:#e08fc2;--green:#2fc497;
--orange:#ff9346;--tip:#eef1f4;--tip-ink:#161b21}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);line-height:1.5;font-size:15px;
font-family:Inter,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:6px 0 10px;font-weight:650;overflow-wrap:anywhere}
h2{font-size:19px;letter-spacing:-.01em;margin:44px 0 4px;font-weight:650}
h3,figcaption{font-size:14.5px;margin:0;font-weight:650}h3{margin-bottom:10px}
figure{margin:0}
p{margin:0}code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.88em}
.brand{display:flex;align-items:center;gap:9px;color:var(--muted);font-size:14px}
.brand svg{width:24px;height:24px;color:var(--green)}
.badge{margin-left:auto;padding:2px 11px;border-radius:99px;font-size:13px;font-weight:600;color:var(--green);
background:color-mix(in srgb,currentColor 13%,transparent)}.badge.open{color:var(--orange)}
.lead{font-size:16.5px;max-width:75ch}.about{color:var(--muted);max-width:80ch;margin-bottom:14px}
.facts{display:flex;flex-wrap:wrap;gap:2px 20px;color:var(--muted);margin-top:10px;font-size:14px}
.facts b{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
.warn{margin-top:18px;padding:11px 15px;border-left:4px solid var(--orange);border-radius:6px;background:var(--card)}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:16px;margin-top:26px}
.card{background:var(--card);border-radius:12px;padding:18px 20px;box-shadow:0 1px 2px rgb(0 0 0/.07);min-width:0}
.tile p{color:var(--muted);font-size:13.5px}.tile b{display:block;font-size:25px;letter-spacing:-.02em;line-height:1.3;
font-weight:650;font-variant-numeric:tabular-nums;color:var(--ink);white-space:nowrap}.tile b small{font-size:17px;
color:var(--muted);font-weight:500}
.tile.hero{grid-column:span 2;grid-row:span 2;display:flex;flex-direction:column;gap:14px;justify-content:space-between}
.hero b{font-size:48px;line-height:1.2;margin-bottom:4px}.hero strong{color:var(--ink);font-weight:600}
.pair{display:flex;flex-wrap:wrap;gap:10px 56px}
.hero .ours b{color:var(--blue)}.hero .theirs b{color:var(--plum)}
.plots{margin-top:14px;display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.plots .card{display:flex;flex-direction:column;gap:10px}
.note,.empty{color:var(--muted);font-size:13px}.empty{padding:40px 0;text-align:center}
.minis{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:20px 28px;margin-top:16px}
.rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:5px 36px;margin-top:16px}
.mini{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:4px 12px;align-items:baseline}
.mini .strip{grid-column:1/-1}
.row{display:grid;grid-template-columns:min(40%,var(--name)) minmax(0,1fr) 92px;gap:10px;align-items:center;
font-size:13px}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;direction:rtl;text-align:left}
.size{font-variant-numeric:tabular-nums;white-space:nowrap;text-align:right}
.up{color:var(--green)}.down{color:var(--orange)}
.scroll{overflow:auto;max-height:560px;padding:0}.below{margin-top:16px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{position:sticky;top:0;z-index:1;background:var(--card);box-shadow:0 1px var(--edge);font-weight:600;text-align:left;
color:var(--muted);font-size:12.5px;white-space:nowrap}
th,td{padding:8px 14px;vertical-align:middle}tr+tr td{border-top:1px solid var(--line)}
th:first-child,td:first-child{padding-left:20px}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.s{white-space:nowrap}
td code{margin-right:4px}.l{display:block;min-width:210px}
.bars{width:30%;min-width:130px}.bars i{display:block;height:7px;border-radius:2px;min-width:1px;margin:2px 0}
.bars .before,.key.before{--c:var(--even)}.bars .after,.key.after{--c:var(--blue)}.bars i{background:var(--c)}
.act{display:inline-flex;align-items:center;gap:7px;white-space:nowrap}.act svg{width:12px;height:12px}
.act path{fill:var(--c)}
.pill{padding:1px 9px;border-radius:99px;font-size:12.5px;background:var(--well)}
.pill.exact{color:var(--green)}.pill.changing{color:var(--orange)}
details summary{cursor:pointer;color:var(--muted)}details code{overflow-wrap:anywhere}
pre{margin:0;padding:14px 18px;background:var(--well);border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere;
user-select:all}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:14px 28px;margin:18px 0 0}
dt{color:var(--muted);font-size:13px}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:860px){main{padding:24px 18px 48px}.plots{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tile.hero{grid-row:auto}}
@media (max-width:460px){main{padding:20px 14px 40px}.card{padding:15px 16px}.scroll{padding:0}.tiles,.plots{gap:12px}
.tile b{font-size:19px}.tile b small{font-size:14px}.hero b{font-size:42px}.tile.hero{grid-column:1/-1}
.chart{overflow:visible;font-size:18px}.spread{font-size:14px}th,td{padding:7px 10px}}
@media print{body{background:#fff}.scroll{max-height:none}.card{break-inside:avoid;box-shadow:none}}
"""

LOGO = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round" '
    'aria-hidden="true"><path d="M12 22V3M12 18H6Q3 18 3 15V13M12 18H18Q21 18 21 15V13M12 11H8Q6 11 6 9V6'
    'M12 11H16Q18 11 18 9V6"/></svg>'
)
