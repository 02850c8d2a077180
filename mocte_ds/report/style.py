"""The look of the report's page: one column of text, on light and dark, from phones to wide screens."""

CSS = """
:root{color-scheme:light dark;--ground:#ffffff;--ink:#1f2328;--soft:#59636e;--line:#d8dde3;
--card:#f5f7f9;--accent:#0a5c94}
@media (prefers-color-scheme:dark){:root{--ground:#16191d;--ink:#e4e8ec;--soft:#a5aeb8;
--line:#3a4149;--card:#20252b;--accent:#6cb6ec}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 20px 64px;overflow-wrap:break-word}
h1{font-size:1.75rem;line-height:1.2;margin:.2em 0}
h2{font-size:1.3rem;margin:2.2em 0 .5em;padding-top:.5em;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6em 0 .4em}
p,figcaption,dd,li{max-width:90ch}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0 4px;font-size:.9rem}
.soft{color:var(--soft);font-size:.9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:18px 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:10px 12px}
.tiles dt{color:var(--soft);font-size:.8rem}
.tiles dd{margin:0;font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums}
.happened p{max-width:none}
.happened{background:var(--card);border-left:4px solid var(--accent);padding:4px 18px;border-radius:0 6px 6px 0}
.stages{list-style:none;padding:0;display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:10px;counter-reset:stage}
.stages li{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:8px 12px;
font-size:.88rem;counter-increment:stage}
.stages b::before{content:counter(stage) "  "}
.stages b{display:block}
.words{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:2px 18px;font-size:.92rem}
.words dt{font-weight:600}.words dd{margin:0}
figure{margin:1.2em 0 2em}
figure img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--line);
border-radius:6px;padding:6px}
figcaption{margin-top:.5em;font-size:.92rem}
figcaption .read{color:var(--soft)}
.absent{background:var(--card);border:1px dashed var(--line);border-radius:6px;padding:10px 14px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.6em 0}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}
th.text,td.text{text-align:left}
td{white-space:nowrap}
td.text{white-space:normal;overflow-wrap:anywhere}
td.text.word{white-space:nowrap;overflow-wrap:normal}
code,pre{overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:12px;
font-size:.8rem;white-space:pre-wrap}
@media (max-width:700px){
main{padding:14px 12px 48px}
h1{font-size:1.4rem}
.words{grid-template-columns:1fr;gap:0}.words dd{margin:0 0 8px}
thead{display:none}
table,tbody,tr,td{display:block;width:100%}
tr{border-bottom:1px solid var(--line);padding:6px 0}
td,td.text,td.text.word{border:0;white-space:normal;overflow-wrap:anywhere;padding:1px 0;
text-align:left;display:grid;grid-template-columns:38% 1fr;gap:8px}
td::before{content:attr(data-label);color:var(--soft)}
td:first-child{font-weight:600}
#facts-table tr{display:grid;grid-template-columns:38% 1fr;gap:8px}
#facts-table td{display:block}
#facts-table td::before{content:none}
}
@media print{nav,details{display:none}figure,table{break-inside:avoid}}
"""
