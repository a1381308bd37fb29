"""What the comparison page says and how it is laid out; flows/comparison/page.py fills it in."""

STYLE = """
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  min-width: 0 }
.lone { grid-column: 1 / -1; max-width: 56rem; display: grid; gap: 0 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) } .lone h3, .lone p { grid-column: 1 / -1 }
.warning { border-left: 4px solid var(--bad); padding: .3rem .8rem; margin: 0 0 1rem }
.gain { white-space: nowrap; font-size: .9em } td b { font-weight: 600 } .small { font-size: .88em }
td .small { white-space: nowrap } summary { cursor: pointer; color: var(--soft); padding: .3rem 0; font-size: .9em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.45 ui-monospace, monospace }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem;
  align-items: start }
.example table { margin-top: .6rem } .example tr:last-child > * { border-bottom: 0 }
.example th { width: 6rem; padding-right: .8rem } .example tr > * { vertical-align: baseline }
.example td:last-child { width: 5.5rem; white-space: nowrap }
.dash { border-top: 2px dashed var(--soft); display: inline-block; width: 1.4rem }
@media (max-width: 30rem) { body { margin: 1rem auto; padding: 0 .7rem } .example th { width: 4rem } }
"""
"""Beside that of all pages and of the plots."""

PAGE = """\
<h1>Models compared</h1>
{% for name, why in found.missing.items() %}
<p class="warning"><b>No report of {{ name }}.</b> It {{ why }}.</p>
{% endfor %}
<div class="cards">
{% for b in best %}
  <div class="card"><b>{{ b.score }}</b><span>{{ b.suite }}, highest: {{ b.models | join(', ') }}</span></div>
{% endfor %}
</div>

<h2>Scores</h2>
{% if suites %}
<p class="note">{{ legend }}
{% if has_base %}<span class="key"><span class="dash"></span>base, with its interval</span>{% endif %}<br>
Whiskers are {{ '%g' | format(100 * found.params.confidence) }}% bootstrap intervals over rows
({{ found.params.bootstrap_samples | thousands }} resamples). Higher is better.</p>
<div class="charts">
{% for p in plots if p.whole %}
<section class="panel{{ ' lone' if plots | length == 1 }}"><h3>{{ p.suite }}
<span class="soft small">{{ p.metric }}, {{ p.rows | thousands }} rows</span></h3>
{% if p.skipped %}<p class="note small">Left out, as there is no data: {{ p.skipped | join(', ') }}</p>{% endif %}
{{ p.whole }}
{% if p.parts %}
<details{{ ' open' if p.open }}><summary>{{ p.tasks }} tasks</summary>
{{ p.parts }}</details>
{% endif %}
</section>
{% endfor %}
</div>

<h2>Scores and gains over the base</h2>
<div class="wide"><table>
<tr><th>model</th>{% for suite in suites %}<th>{{ suite }}</th>{% endfor %}<th class="n">held-out loss</th></tr>
{% for row in scores %}
<tr><td><b>{{ row.name }}</b></td>
{% for cell in row.cells %}
<td><b>{{ cell.score }}</b> <span class="soft small">{{ cell.interval }}</span>
{% if cell.gain %}
<br><span class="gain {{ {'better': 'good', 'worse': 'bad', 'unclear': 'soft'}[cell.says] }}">
{{ {'better': '▲', 'worse': '▼', 'unclear': '≈'}[cell.says] }} {{ cell.gain }}</span>
{% endif %}
</td>
{% endfor %}
<td class="n">{{ row.loss }}</td></tr>
{% endfor %}
</table></div>
<p class="note">Second lines are paired gains: the mean difference from the base's score on the same items, with its
interval. ▲ better: the interval is above 0; ▼ worse: below; ≈ it holds 0, so nothing is shown either way. The held-out
loss is in nats per token.</p>
{% for t in tasks if t.rows | length > 1 %}
<details><summary>{{ t.suite }} by task</summary>
<div class="wide"><table>
<tr><th>task</th><th>metric</th><th class="n">rows</th>{% for m in t.models %}<th>{{ m }}</th>{% endfor %}</tr>
{% for row in t.rows %}
<tr><td>{{ row.task }}</td><td class="soft">{{ row.metric }}</td><td class="n">{{ row.rows | thousands }}</td>
{% for cell in row.cells %}<td>{{ cell.score }} <span class="soft small">{{ cell.more }}</span></td>{% endfor %}</tr>
{% endfor %}
</table></div></details>
{% endfor %}
{% else %}<p>No model was evaluated yet.</p>{% endif %}

<h2>Learning curves</h2>
{% if curves %}
<p class="note">The thin line is the loss of each training step, dots are the loss on held-out rows, from before the
first step to the weights that were kept. Objectives have losses of their own: compare shapes between methods, not
heights.</p>
<div class="charts">
{% for c in curves %}
<section class="panel"><h3>{{ c.name }} <span class="soft small">{{ c.adapter }}, {{ c.objective }}; held out
{{ '%.3f' | format(c.before) }} → {{ '%.3f' | format(c.after) }}</span></h3>
{{ c.plot }}</section>
{% endfor %}
</div>
{% else %}<p>No method was trained yet.</p>{% endif %}

<h2>Where models differ</h2>
{% if examples %}
<p class="note">The items whose scores differ most: by the variance among methods, then with the base, then by the
prompt's digest; every task in turn, at most {{ most }}.</p>
<div class="examples">
{% for e in examples %}
<section class="panel example"><h3>{{ e.item.suite }} <span class="soft small">{{ e.item.task }}</span></h3>
<pre>{{ shown(e.prompt) }}</pre>
<table><tr><th>expected</th><td><pre>{{ shown(e.item.target) }}</pre></td><td></td></tr>
{% for name, answer in e.answers.items() %}
{% set m = mark(answer.score) %}
<tr><th>{{ name }}</th><td>
{% if answer.prediction %}<pre>{{ shown(answer.prediction) }}</pre>
{% else %}<span class="soft">(nothing)</span>{% endif %}
</td><td class="{{ m.css }}">{{ m.text }}</td></tr>
{% endfor %}
</table></section>
{% endfor %}
</div>
{% else %}<p>There is no item that all models answered and scored differently on.</p>{% endif %}

<h2>Cost</h2>
<div class="wide"><table>
<tr><th>model</th><th class="n">trained parameters</th><th class="n">weights</th><th class="n">steps</th>
<th class="n">tokens</th><th class="n">time</th><th class="n">tokens/s</th><th class="n">energy, estimated</th>
<th>evaluation</th></tr>
{% for c in costs %}
<tr><td><b>{{ c.name }}</b></td>
{% for key in ('trained', 'weights', 'steps', 'tokens', 'time', 'speed', 'energy') %}
<td class="n">{{ c[key] or '–' }}</td>
{% endfor %}
<td>{{ c.evaluation or '–' }}</td></tr>
{% endfor %}
</table></div>
<p class="note">Time is that of the training stage in this workspace, with loading, looks at held-out rows and
checkpoints; of one that was stopped and went on, since then. Tokens/s is over all of it. A dash: not recorded here.
Energy is an estimate, not a measurement: time x power ({{ found.power.source }}), as if all of it were drawn all the
time; memory, cooling and power supplies are left out.</p>

{% if answers %}
<h2>Answers</h2>
<div class="wide"><table>
<tr><th>model</th><th class="n">characters</th><th class="n">tokens</th><th class="n">empty</th>
<th class="n">refusals</th><th class="n">repetition</th></tr>
{% for name, a in answers %}
<tr><td><b>{{ name }}</b></td><td class="n">{{ '%.1f' | format(a.characters) }}</td>
<td class="n">{{ '%.1f' | format(a.tokens) }}</td><td class="n">{{ percent(a.empty) }}</td>
<td class="n">{{ percent(a.refusals) }}</td><td class="n">{{ percent(a.repetition) }}</td></tr>
{% endfor %}
</table></div>
<p class="note">Means over answers. Refusals begin by declining, in English or Chinese. Repetition is the share of runs
of four words that stood in the same answer before (seq-rep-4, arXiv:1908.04319).</p>
{% endif %}

{% if forgetting %}
<h2>Forgetting</h2>
<div class="wide"><table>
<tr><th>model</th><th class="n">loss on general text</th><th class="n">the base's</th><th class="n">difference</th>
<th class="n">tokens</th></tr>
{% for name, f in forgetting %}
<tr><td><b>{{ name }}</b></td><td class="n">{{ '%.3f' | format(f.loss) }}</td>
<td class="n">{{ '%.3f' | format(f.base_loss) }}</td><td class="n">{{ '%+.3f' | format(f.loss - f.base_loss) }}</td>
<td class="n">{{ f.tokens | thousands }}</td></tr>
{% endfor %}
</table></div>
<p class="note">Nats per token. Above the base's: what the base knew of general text became less likely.</p>
{% endif %}
"""
"""A Jinja template."""
