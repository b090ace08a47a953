"""The script of the page: asks for `status.json` every few seconds and shows it.

Texts become text nodes and nothing else (no markup is ever made of data), and elements are changed in place, so that a
reader's scroll position and focus stay.
"""

SCRIPT = r"""
'use strict';
(() => {
const SVG = 'http://www.w3.org/2000/svg';
const EVERY = 2000;
const byId = id => document.getElementById(id);
const say = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const make = (name, parent, text) => { const element = document.createElement(name);
  if (text !== undefined) element.textContent = text; if (parent) parent.append(element); return element; };
const draw = (name, values, parent) => { const element = document.createElementNS(SVG, name);
  for (const key in values) element.setAttribute(key, values[key]); if (parent) parent.append(element); return element; };

const duration = seconds => {
  if (seconds === null || seconds === undefined) return 'unknown';
  const whole = Math.round(Math.max(0, seconds));
  if (whole < 100) return whole + ' s';
  const minutes = Math.round(whole / 60);
  if (minutes < 60) return minutes + ' min';
  if (minutes < 1440) return Math.floor(minutes / 60) + ' h ' + String(minutes % 60).padStart(2, '0') + ' min';
  return Math.floor(minutes / 1440) + ' d ' + Math.floor(minutes % 1440 / 60) + ' h';
};
const size = count => { const units = ['B', 'kB', 'MB', 'GB', 'TB']; let unit = 0;
  while (count >= 999.5 && unit < 4) { count /= 1000; unit += 1; }
  return (unit === 0 || count >= 99.5 ? count.toFixed(0) : count.toFixed(1)) + ' ' + units[unit]; };
const number = (value, digits) => value === null || value === undefined ? '' :
  Math.abs(value) < 100 ? value.toFixed(digits) : value.toPrecision(3);
const ago = (status, time) => time ? duration(status.now - time) + ' ago' : '';
const short = digest => digest.slice(0, 12);

const table = (id, rows) => {
  const body = byId(id).tBodies[0], heads = byId(id).tHead.rows[0].cells;
  const kept = new Map([...body.rows].map(row => [row.dataset.key, row]));
  rows.forEach(([key, cells, state], place) => {
    let row = kept.get(key);
    kept.delete(key);
    if (!row) { row = document.createElement('tr'); row.dataset.key = key;
      cells.forEach((_, index) => { const cell = make(index ? 'td' : 'th', row);
        if (index) cell.className = heads[index].className; else cell.scope = 'row'; }); }
    cells.forEach((cell, index) => say(row.cells[index], cell));
    row.dataset.state = state || '';
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] || null);
  });
  kept.forEach(row => row.remove());
  byId(id).closest('section').hidden = rows.length === 0;
};

const told = job => { const [first, last] = [job.curve[0], job.curve[job.curve.length - 1]];
  return 'Loss of ' + job.name + ', ' + (job.node || 'nobody') + ': ' + number(first[1], 3) + ' at step ' + first[0] +
    (job.curve.length > 1 ? ', ' + number(last[1], 3) + ' at step ' + last[0] : '') +
    (job.steps ? ' of ' + job.steps : '') + '.'; };
const WIDTH = 300, HEIGHT = 110, LEFT = 8, RIGHT = 8, TOP = 20, BOTTOM = 20;
const curve = (figure, job) => {
  const svg = figure.querySelector('svg'), text = told(job);
  if (svg.dataset.told === text) return;
  svg.dataset.told = text;
  const points = job.curve, losses = points.map(point => point[1]);
  const low = Math.min(...losses), high = Math.max(...losses), end = Math.max(job.steps, points[points.length - 1][0], 1);
  const x = step => LEFT + (WIDTH - LEFT - RIGHT) * step / end;
  const y = loss => high > low ? TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low) : HEIGHT / 2;
  const [title, axis, line, dot, top, bottom, right] = svg.children;
  say(title, text);
  line.setAttribute('d', points.map((point, index) =>
    (index ? 'L' : 'M') + x(point[0]).toFixed(1) + ' ' + y(point[1]).toFixed(1)).join(''));
  const last = points[points.length - 1];
  dot.setAttribute('cx', x(last[0])); dot.setAttribute('cy', y(last[1]));
  say(top, 'loss ' + number(high, 3)); say(bottom, number(low, 3));
  say(right, 'step ' + last[0] + (job.steps ? '/' + job.steps : ''));
  say(figure.querySelector('figcaption'), job.name + ' · ' + (job.node || 'nobody') +
    (job.state === 'running' && job.tokens_per_second ? ' · ' + number(job.tokens_per_second, 0) + ' tokens/s' : ''));
};
let figures = 0;
const frame = parent => {
  const figure = make('figure', parent), name = 'curve-' + (figures += 1);
  const svg = draw('svg', {'class': 'plot', viewBox: '0 0 ' + WIDTH + ' ' + HEIGHT,
    role: 'img', 'aria-labelledby': name}, figure);
  draw('title', {id: name}, svg);
  draw('path', {'class': 'axis', d: 'M' + LEFT + ' ' + (HEIGHT - BOTTOM) + 'H' + (WIDTH - RIGHT)}, svg);
  draw('path', {'class': 'line'}, svg);
  draw('circle', {'class': 'dot', r: 3}, svg);
  draw('text', {x: LEFT, y: 13}, svg);
  draw('text', {x: LEFT, y: HEIGHT - 5}, svg);
  draw('text', {x: WIDTH - RIGHT, y: HEIGHT - 5, 'text-anchor': 'end'}, svg);
  make('figcaption', figure);
  return figure;
};
const curves = (id, jobs) => {
  const parent = byId(id), kept = new Map([...parent.children].map(figure => [figure.dataset.key, figure]));
  jobs.forEach((job, place) => {
    let figure = kept.get(job.name);
    kept.delete(job.name);
    if (!figure) { figure = frame(parent); figure.dataset.key = job.name; }
    curve(figure, job);
    if (parent.children[place] !== figure) parent.insertBefore(figure, parent.children[place] || null);
  });
  kept.forEach(figure => figure.remove());
  parent.closest('.group').hidden = jobs.length === 0;
};

const order = {running: 0, quarantined: 1, open: 2, done: 3};
const show = status => {
  const stage = status.stage, counts = status.counts;
  const name = status.name || 'federation';
  document.title = name + ': ' + status.state;
  say(byId('name'), name);
  const done = stage.total ? stage.done + ' of ' + stage.total : stage.done + ' done';
  const over = status.state === 'finished' || status.state === 'failed';
  say(byId('answer'), over ? 'The federation has ' + status.state + '.' :
    status.state === 'waiting' ? 'The federation waits for participants.' :
    stage.name ? 'Stage ' + stage.name + ': ' + done + '. Left in this stage: ' + duration(status.eta) + '.' :
    'The federation runs.');
  byId('bar').hidden = over || !stage.total;
  byId('bar').max = stage.total || 1;
  byId('bar').value = Math.min(stage.done, stage.total);
  say(byId('bar'), done);
  say(byId('reason'), status.reason);
  byId('reason').hidden = !status.reason;
  const here = status.nodes.filter(node => node.state === 'here').length;
  const handed = status.contributions.filter(one => !one.withdrawn).length;
  Object.entries({participants: here + ' of ' + status.nodes.length, training: counts.running, waiting: counts.open,
    done: counts.done, unused: counts.quarantined, received: size(status.received), sent: size(status.sent),
    arrived: status.arrived, contributed: handed,
    running: status.began ? duration((over ? status.time : status.now) - status.began) : ''
  }).forEach(([id, value]) => say(byId(id), String(value)));
  const drawn = status.jobs.filter(job => job.curve.length > 0);
  curves('now', drawn.filter(job => job.state === 'running'));
  curves('before', drawn.filter(job => job.state !== 'running').sort((a, b) => b.ended - a.ended).slice(0, 12));
  byId('none').hidden = drawn.length > 0;
  table('nodes', status.nodes.map(node => [node.name, [
    node.name, node.state === 'here' ? (node.job ? 'trains' : 'idle') : node.state,
    node.job || node.reason, String(node.done), ago(status, node.seen), node.tasks.join(', '), node.devices.join(', ')],
    node.state]));
  const jobs = [...status.jobs].sort((a, b) => order[a.state] - order[b.state] || b.ended - a.ended).slice(0, 200);
  table('jobs', jobs.map(job => [job.name,
    [job.name, job.state, job.node, job.steps ? job.step + '/' + job.steps : '', number(job.loss, 3),
    number(job.tokens_per_second, 0), job.seconds ? duration(job.seconds) : '', String(job.attempts), job.reason], job.state]));
  table('arrivals', status.arrivals.slice(-50).reverse().map(one => [one.name + ' ' + one.digest, [
    one.name, one.node, short(one.digest),
    one.size ? size(one.size) : '', number(one.norm, 2), number(one.cosine, 2), ago(status, one.time)]]));
  table('contributions', [...status.contributions].reverse().map(one => [one.digest, [
    one.name || one.task, one.task, one.participant,
    short(one.digest), one.withdrawn ? 'withdrawn' : 'in use', ago(status, one.time)],
    one.withdrawn ? 'gone' : '']));
  table('notes', [...status.notes].reverse().map(note => [note.time + note.text, [note.text, ago(status, note.time)]]));
};

let answered = Date.now();
const look = async () => {
  const notice = byId('notice');
  try {
    const answer = await fetch('status.json', {cache: 'no-store', credentials: 'omit'});
    if (!answer.ok) throw new Error('status ' + answer.status);
    const status = await answer.json();
    show(status);
    answered = Date.now();
    notice.hidden = true;
  } catch (error) {
    say(notice, 'No answer from the coordinator for ' + duration((Date.now() - answered) / 1000) + '.');
    notice.hidden = false;
  }
  setTimeout(look, EVERY);
};
look();
})();
"""
