'use strict';

// Everything that is shown gets into the page as text or as an attribute, never as HTML.

const PER_PAGE = 50;
/** How long to wait before asking again, in milliseconds: while events wait, when all are through, when it went wrong. */
const BUSY_MS = 1000, IDLE_MS = 5000, PROBLEM_MS = 2000;
const COLOURS = 8;
const TRACK = 24, BLOCK = 15;

const $ = (id) => document.getElementById(id);
const number = (n) => n.toLocaleString('en');
const time = (text) => (text === null ? null : Date.parse(text));
const clock = (ms) => new Date(ms).toISOString().slice(11, 23);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS('http://www.w3.org/2000/svg', name), attributes, children);

const plural = (n, noun) => `${number(n)} ${noun}${n === 1 ? '' : 's'}`;

function duration(ms) {
  if (ms < 0) return `−${duration(-ms)}`;
  if (ms === 0) return '0 s';
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${ms.toFixed(0)} ms`;
  if (ms < 100_000) return `${(ms / 1000).toFixed(2)} s`;
  const s = Math.round(ms / 1000);
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, '0')} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, '0')} min`;
}

// What is asked for is in the address, so that it can be passed on.

const asked = new URLSearchParams(location.search);
const view = {
  prefix: asked.get('prefix') ?? '',
  only: asked.get('only') ?? 'all',
  sort: asked.get('sort') ?? 'events',
  page: Number.parseInt(asked.get('page') ?? '0', 10) || 0,
};

function query() {
  const query = new URLSearchParams();
  if (view.prefix) query.set('prefix', view.prefix);
  if (view.only !== 'all') query.set('only', view.only);
  if (view.sort !== 'events') query.set('sort', view.sort);
  if (view.page) query.set('page', view.page);
  return query;
}

function change(changes) {
  Object.assign(view, { page: 0 }, changes);
  const search = query().toString();
  history.replaceState(null, '', search ? `?${search}` : location.pathname);
  controls();
  ask();
}

// Asking, and asking again.

let timer, latest = null, question = 0;

async function json(url) {
  const answer = await fetch(url, { headers: { accept: 'application/json' }, signal: AbortSignal.timeout(30_000) });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail ?? `the answer's status is ${answer.status}`);
  return body;
}

async function ask() {
  clearTimeout(timer);
  const mine = ++question;
  let wait = PROBLEM_MS;
  try {
    const parameters = query();
    parameters.set('perPage', PER_PAGE);
    const results = await json(`api/v1/results?${parameters}`);
    if (mine !== question) return;
    latest = results;
    show();
    $('problem').hidden = true;
    wait = isBusy(results.totals) ? BUSY_MS : IDLE_MS;
  } catch (error) {
    if (mine !== question) return;
    $('problem').textContent = `No figures for now: ${error.message}`;
    $('problem').hidden = false;
  }
  // A page that nobody sees asks nothing.
  if (!document.hidden) timer = setTimeout(ask, wait);
}

/** Whether events wait for anything but an operator. */
const isBusy = (totals) => totals.waiting > totals.parked;

// Totals.

function set(id, text, title) {
  $(id).textContent = text;
  $(id).title = title ?? '';
}

function show() {
  const { totals } = latest;
  set('accounts', number(totals.accounts));
  set('accepted', number(totals.accepted));
  set('applied', number(totals.applied));
  set('skipped', number(totals.skipped));
  set('waiting', number(totals.waiting));
  set('parked', number(totals.parkedAccounts));
  $('parked').parentElement.classList.toggle('bad', totals.parkedAccounts > 0);

  const none = totals.accepted === 0;
  set('order-errors', none ? '–' : number(totals.orderErrors));
  set('order-note', none ? '' : totals.orderErrors === 0
    ? 'all in order, nothing twice'
    : `in ${plural(totals.disorderedAccounts, 'account')}`);
  $('order').className = none ? '' : totals.orderErrors === 0 ? 'good' : 'bad';

  const { elapsedMs, elapsedToLongest, eventsPerSecond, longestAccount } = totals;
  set('ratio', elapsedToLongest === null ? '–' : elapsedToLongest.toFixed(3));
  set('ratio-note', elapsedToLongest !== null ? '1 is as fast as order allows'
    : longestAccount === null ? '' : 'handling takes no time by itself');
  set('elapsed', elapsedMs === null ? '–' : duration(elapsedMs));
  set('elapsed-note', elapsedMs === null ? '' : 'first accepted to last through');
  set('longest', longestAccount === null ? '–' : longestAccount.accountId, longestAccount?.accountId);
  set('longest-note', longestAccount === null ? '' :
    `${plural(longestAccount.events, 'event')}, ${duration(longestAccount.workMs)} of work`);
  set('rate', eventsPerSecond === null ? '–'
    : eventsPerSecond < 100 ? eventsPerSecond.toFixed(1) : number(Math.round(eventsPerSecond)));

  const age = time(latest.now) - time(totals.computedAt);
  $('as-of').textContent = age > 3000 ? `as of ${duration(age)} ago: so many events take a while to add up` : '';

  progress(totals, none);
  workers(totals);
  controls();
  list();
}

function progress(totals, none) {
  const through = totals.applied + totals.skipped;
  const share = (n) => `${none ? 0 : (100 * n) / totals.accepted}%`;
  $('through-applied').style.width = share(totals.applied);
  $('through-skipped').style.width = share(totals.skipped);
  $('through-parked').style.width = share(totals.parked);
  $('through').classList.toggle('all', !none && totals.waiting === 0);
  $('through').setAttribute('aria-valuenow', none ? 0 : Math.floor((100 * through) / totals.accepted));

  const idle = time(latest.now) - (time(totals.lastProcessedAt) ?? time(totals.firstGeneratedAt) ?? 0);
  const parked = `${plural(totals.parkedAccounts, 'account')} parked`;
  const wrong = totals.orderErrors > 0 ? 'out of order · ' : '';
  let text, kind;
  if (none) [text, kind] = ['no events yet', ''];
  else if (totals.waiting === 0) [text, kind] = [`all ${number(totals.accepted)} through`, 'good'];
  else if (!isBusy(totals)) [text, kind] = [`${number(through)} of ${number(totals.accepted)} through · ${parked}`, 'warn'];
  else if (idle > 10_000) [text, kind] = [`${number(through)} of ${number(totals.accepted)} through · nothing for ${duration(idle)}`, 'warn'];
  else [text, kind] = [`${number(through)} of ${number(totals.accepted)} through`, 'busy'];
  if (wrong) kind = 'bad';
  // The same again would be read out again.
  if ($('state').textContent !== wrong + text) $('state').textContent = wrong + text;
  $('state').className = `pill ${kind}`;
  document.title = `${wrong}${text} – Account events`;
}

/** Who applied what has the colour of its place among the workers, which are in the order in which they began. */
let colours = new Map();

function workers(totals) {
  colours = new Map(totals.workers.map((worker, index) => [worker.worker, `c${index % COLOURS}`]));
  const working = totals.workers.length;
  $('workers-note').textContent = working === 0 ? 'none yet' : number(working);
  const most = Math.max(1, ...totals.workers.map((worker) => worker.applied));
  $('workers').replaceChildren(...totals.workers.map((worker) => {
    const share = el('div', { class: colours.get(worker.worker) });
    share.style.width = `${(100 * worker.applied) / most}%`;
    const first = time(worker.firstProcessedAt) - time(totals.firstGeneratedAt);
    const last = time(worker.lastProcessedAt) - time(totals.firstGeneratedAt);
    return el('li', {},
      el('div', { class: 'name' },
        el('span', { title: worker.worker }, worker.worker), el('b', {}, number(worker.applied))),
      el('div', { class: 'share' }, share),
      el('div', { class: 'when' }, `its first after ${duration(first)}, its last after ${duration(last)}`));
  }));
}

// Which accounts.

function controls() {
  if (document.activeElement !== $('prefix')) $('prefix').value = view.prefix;
  $('sort').value = view.sort;
  const totals = latest?.totals;
  const counts = totals && {
    all: totals.accounts, waiting: totals.waitingAccounts, parked: totals.parkedAccounts, errors: totals.disorderedAccounts,
  };
  for (const button of $('only').querySelectorAll('button')) {
    button.setAttribute('aria-pressed', button.value === view.only);
    button.querySelector('b').textContent = counts ? number(counts[button.value]) : '';
    button.classList.toggle('bad', button.value === 'errors' && counts?.errors > 0);
  }
  const matching = latest?.matching ?? 0;
  const first = view.page * PER_PAGE;
  $('range').textContent = matching === 0 ? '' :
    `${number(Math.min(first + 1, matching))}–${number(Math.min(first + PER_PAGE, matching))} of ${number(matching)}`;
  $('previous').disabled = view.page === 0;
  $('next').disabled = first + PER_PAGE >= matching;
}

let typing;
$('prefix').value = view.prefix;
$('prefix').addEventListener('input', () => {
  clearTimeout(typing);
  typing = setTimeout(() => change({ prefix: $('prefix').value.trim() }), 250);
});
$('controls').addEventListener('submit', (event) => event.preventDefault());
$('only').addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) change({ only: button.value });
});
$('sort').addEventListener('change', () => change({ sort: $('sort').value }));
$('previous').addEventListener('click', () => change({ page: Math.max(0, view.page - 1) }));
$('next').addEventListener('click', () => change({ page: view.page + 1 }));

// The accounts, each with a timeline: all on one scale, which begins with the first event accepted.

let rows = new Map();

/** The steps between ticks, in milliseconds: some that people count by. */
const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 15_000, 30_000, 60_000, 120_000, 300_000,
  600_000, 900_000, 1_800_000, 3_600_000, 7_200_000, 21_600_000, 43_200_000, 86_400_000];

function scale() {
  const { totals } = latest;
  const start = time(totals.firstGeneratedAt);
  const width = $('ticks').clientWidth;
  if (start === null || width === 0) return null;
  const last = Math.max(time(totals.lastProcessedAt) ?? start, isBusy(totals) ? time(latest.now) : start);
  const length = Math.max(1, last - start);
  const ticks = Math.max(2, Math.floor(width / 90));
  const step = STEPS.find((step) => length / step <= ticks) ?? Math.ceil(length / ticks / 86_400_000) * 86_400_000;
  // While it goes on, the end is a whole step: else everything would shift all the time.
  const end = isBusy(totals) ? Math.ceil((length * 1.02) / step) * step : length * 1.005;
  return { start, now: time(latest.now), end, step, width, x: (ms) => ((ms - start) / end) * width };
}

function axis(scale) {
  const ticks = [];
  for (let at = 0; scale && at <= scale.end; at += scale.step) {
    const label = el('span', {}, at === 0 ? '0' : tick(at, scale.step, scale.end));
    const x = scale.x(scale.start + at);
    if (scale.width - x < 30 && at > 0) label.className = 'end';
    label.style.left = `${x}px`;
    ticks.push(label);
  }
  $('ticks').replaceChildren(...ticks);
}

/** The time of a tick, in the unit that the steps between ticks are whole in. */
function tick(ms, step, end) {
  if (end < 1000) return `${ms} ms`;
  if (step < 1000) return `${(ms / 1000).toFixed(step < 100 ? 2 : 1)} s`;
  const [unit, length] = [['h', 3_600_000], ['min', 60_000], ['s', 1000]].find(([, length]) => step % length === 0);
  return `${number(ms / length)} ${unit}`;
}

function list() {
  const shared = scale();
  axis(shared);
  // What every timeline depends on.
  const frame = JSON.stringify([shared && [shared.start, shared.end, shared.width], isBusy(latest.totals) && latest.now,
    [...colours.keys()]]);
  const kept = new Map();
  for (const account of latest.accounts) {
    const row = rows.get(account.accountId) ?? open(account.accountId);
    kept.set(account.accountId, row);
    const isQuiet = account.applied === account.head;
    const key = JSON.stringify(account) + (isQuiet && shared ? [shared.start, shared.end, shared.width, ...colours.keys()] : frame);
    if (row.key !== key) {
      draw(row, account, shared);
      row.key = key;
    }
  }
  rows = kept;
  // Elements stay where they are right already, so that focus and text selections live on.
  [...kept.values()].forEach((row, index) => {
    if ($('list').children[index] !== row.item) $('list').insertBefore(row.item, $('list').children[index] ?? null);
  });
  while ($('list').children.length > kept.size) $('list').lastElementChild.remove();
  $('list').hidden = kept.size === 0;
  $('empty').hidden = kept.size > 0;
  $('empty').textContent = latest.totals.accounts === 0
    ? view.prefix ? `No account's id starts with “${view.prefix}”.` : 'No event has been accepted yet.'
    : view.only === 'errors' ? 'No account is out of order.' : 'No such account.';
}

function open(accountId) {
  const row = {
    accountId,
    key: '',
    id: el('span', { class: 'id' }),
    done: el('span', { class: 'done' }),
    track: svg('svg', { height: TRACK, role: 'img' }),
    details: null,
  };
  row.head = el('button', { type: 'button', class: 'row', 'aria-expanded': 'false' }, row.id, row.done, row.track);
  row.item = el('li', {}, row.head);
  row.head.addEventListener('click', () => toggle(row));
  row.track.addEventListener('pointermove', (event) => tell(row, event));
  row.track.addEventListener('pointerleave', () => tell(row, null));
  return row;
}

/** When it was an event's turn: accepted, and the one before it through. `null` where that isn't known. */
function turn(events, index) {
  const event = events[index];
  const generated = time(event.generatedAt);
  if (event.seq === 1) return generated;
  const before = index > 0 ? time(events[index - 1].processedAt) : null;
  return before === null ? null : Math.max(generated, before);
}

function draw(row, account, scale) {
  row.account = account;
  const { events, head, applied } = account;
  row.done.replaceChildren(el('b', {}, number(applied)), ` of ${number(head)}`);
  row.id.replaceChildren(el('span', { title: row.accountId }, row.accountId));
  if (account.orderErrors > 0) row.id.append(el('span', { class: 'mark' }, plural(account.orderErrors, 'error')));
  if (account.parkedAt !== null) row.id.append(el('span', { class: 'mark' }, 'parked'));
  const said = [`${row.accountId}: ${applied} of ${head} events through`];
  if (account.orderErrors > 0) said.push(`${account.orderErrors} out of order`);
  if (account.parkedAt !== null) said.push('parked');
  row.track.setAttribute('aria-label', said.join(', '));
  if (scale) row.track.replaceChildren(...timeline(account, scale));
  row.track.setAttribute('width', scale?.width ?? 0);
  if (row.details) fetchDetails(row);
}

function timeline(account, scale) {
  const { events, head } = account;
  const [y, middle] = [(TRACK - BLOCK) / 2, TRACK / 2];
  const drawn = [];
  for (let at = scale.step; at < scale.end; at += scale.step) {
    const x = Math.round(scale.x(scale.start + at)) + 0.5;
    drawn.push(svg('line', { class: 'grid', x1: x, x2: x, y1: 0, y2: TRACK }));
  }
  if (events.length === 0) return drawn;

  const block = (attributes, from, to, label, seq) => {
    const [left, right] = [scale.x(from), scale.x(to)];
    const width = Math.max(1.5, right - left - 1);
    drawn.push(svg('rect', { ...attributes, x: left, y, width, height: BLOCK, rx: Math.min(2, width / 3), 'data-seq': seq }));
    if (width > 7 * label.length + 3) drawn.push(svg('text', { x: left + width / 2, y: middle + 3.5 }, label));
  };

  // From when each was accepted to its turn: below the blocks of those before it.
  events.forEach((event, index) => {
    const [from, to] = [time(event.generatedAt), turn(events, index) ?? time(event.processedAt) ?? scale.now];
    if (to > from) {
      drawn.push(svg('line', { class: 'wait', x1: Math.max(0, scale.x(from)), x2: scale.x(to), y1: middle, y2: middle }));
    }
  });

  const earlier = events[0].seq - 1;
  const backwards = [];
  events.forEach((event, index) => {
    const processed = time(event.processedAt);
    if (processed === null) return;
    const from = turn(events, index);
    const label = String(event.seq);
    if (from === null) block(look(event), processed - scale.end / scale.width, processed, label, event.seq);
    else if (from > processed) backwards.push(event);
    else block(look(event), from, processed, label, event.seq);
  });
  // Before the one that it has to follow: on top, where nothing hides it.
  for (const { processedAt, seq } of backwards) {
    const at = time(processedAt);
    block({ class: 'backwards' }, at, at + (5 * scale.end) / scale.width, '', seq);
  }
  const next = events.findIndex((event) => event.processedAt === null);
  const waiting = head - account.applied;
  if (next >= 0) {
    const parked = account.parkedAt !== null;
    const from = turn(events, next) ?? time(events[next].generatedAt);
    const to = Math.max(from, parked ? scale.start + scale.end : scale.now);
    block({ class: parked ? 'held' : 'spin', 'pointer-events': 'all' }, from, to, '', events[next].seq);
    const more = parked ? `${number(waiting)} held` : waiting > 1 ? `+${number(waiting - 1)}` : '';
    const x = parked ? scale.x(from) + 6 : scale.x(to) + 4;
    if (more) drawn.push(svg('text', { class: 'more', x: Math.min(x, scale.width - 7 * more.length), y: middle + 3.5 }, more));
  }
  if (earlier > 0) {
    const label = `${number(earlier)} earlier`;
    const room = scale.x(turn(events, 0) ?? time(events[0].processedAt) ?? time(events[0].generatedAt));
    if (room > 6 * label.length + 4) drawn.push(svg('text', { class: 'more', x: 2, y: middle + 3.5 }, label));
  }
  return drawn;
}

function look(event) {
  if (event.outcome === 'skipped') return { class: 'skip' };
  return { class: `${colours.get(event.worker) ?? 'c7'}${event.seq % 2 ? '' : ' even'}` };
}

// What is under the pointer.

function tell(row, pointer) {
  const seq = Number(pointer?.target.dataset?.seq ?? 0);
  const index = row.account?.events.findIndex((event) => event.seq === seq) ?? -1;
  row.track.querySelector('.span')?.remove();
  $('tip').hidden = index < 0;
  if (index < 0) return;
  const shared = scale();
  const event = row.account.events[index];
  const [generated, processed, from] = [time(event.generatedAt), time(event.processedAt), turn(row.account.events, index)];
  const since = (ms) => `${clock(ms)} UTC, ${duration(ms - shared.start)} after the first`;
  const isNext = event.seq === row.account.applied + 1;
  const lines = [`event ${number(event.seq)} of ${row.accountId}`, `accepted ${since(generated)}`];
  if (processed !== null) {
    lines.push(`${event.outcome} ${since(processed)}`);
    lines.push(`${duration(processed - generated)} in all${from !== null && from <= processed ? `, ${duration(processed - from)} since its turn` : ''}`);
    lines.push(`by ${event.worker}`);
  } else if (isNext && row.account.parkedAt !== null) {
    lines.push(`parked after ${plural(row.account.attempts, 'attempt')}: ${row.account.lastError ?? 'no reason is known'}`);
  } else if (isNext && row.account.attempts > 0) {
    lines.push(`${plural(row.account.attempts, 'attempt')} failed so far: ${row.account.lastError ?? 'no reason is known'}`);
  } else {
    lines.push(`waiting for ${duration(shared.now - generated)}`);
  }
  $('tip').textContent = lines.join('\n');
  const [left, right] = [shared.x(generated), shared.x(processed ?? shared.now)];
  row.track.append(svg('rect', { class: 'span', x: left + 0.5, y: 1.5, width: Math.max(2, right - left - 1), height: TRACK - 3, rx: 2 }));
  const box = $('tip').getBoundingClientRect();
  const below = pointer.clientY + 16 + box.height < innerHeight;
  $('tip').style.left = `${Math.max(4, Math.min(pointer.clientX + 12, innerWidth - box.width - 8))}px`;
  $('tip').style.top = `${below ? pointer.clientY + 16 : pointer.clientY - box.height - 12}px`;
}

// The events of one account, page by page.

function toggle(row) {
  if (row.details) {
    row.details.remove();
    row.details = null;
  } else {
    row.details = el('div', { class: 'more-of' });
    row.pages = 1;
    row.item.append(row.details);
    fetchDetails(row);
  }
  row.head.setAttribute('aria-expanded', String(row.details !== null));
}

async function fetchDetails(row) {
  const mine = (row.asked = (row.asked ?? 0) + 1);
  try {
    let [events, next] = [[], 0];
    for (let page = 0; page < row.pages && next !== null; page += 1) {
      const answer = await json(`api/v1/event/${encodeURIComponent(row.accountId)}?after=${next}`);
      events.push(...answer.events);
      next = answer.next;
    }
    if (row.details && mine === row.asked) showDetails(row, events, next);
  } catch (error) {
    row.details?.replaceChildren(el('p', {}, `No events for now: ${error.message}`));
  }
}

function showDetails(row, events, next) {
  const start = time(latest.totals.firstGeneratedAt);
  const at = (ms) => (ms === null ? '' : duration(ms - start));
  const cell = (text, attributes = {}) => el('td', attributes, text);
  const { account } = row;
  const body = events.map((event, index) => {
    const waiting = account.parkedAt !== null && event.seq === account.applied + 1 ? 'parked' : 'waiting';
    const [generated, processed, from] = [time(event.generatedAt), time(event.processedAt), turn(events, index)];
    return el('tr', {}, cell(number(event.seq)), cell(at(generated), { title: event.generatedAt }),
      cell(at(processed), { title: event.processedAt }), cell(processed === null ? '' : duration(processed - generated)),
      cell(processed === null || from === null ? '' : duration(processed - from)),
      cell(event.outcome ?? waiting, { class: 'text' }), cell(event.worker ?? '', { class: 'text' }));
  });
  const heads = [['event'], ['accepted'], ['through'], ['in all'], ['since its turn'], ['outcome', 'text'], ['by', 'text']];
  const content = [];
  if (account.parkedAt !== null) {
    content.push(el('p', { class: 'bad' }, `Event ${number(account.applied + 1)} is parked since ${clock(time(account.parkedAt))} UTC, after ` +
      `${plural(account.attempts, 'attempt')}: ${account.lastError ?? 'no reason is known'}`));
  }
  if (account.orderErrors > 0) {
    const pairs = account.disorder.map((pair) => `${number(pair.seq)} after ${pair.after === 0 ? 'nothing' : number(pair.after)}`);
    const rest = account.orderErrors > pairs.length ? ', …' : '';
    content.push(el('p', { class: 'bad' }, `Took effect out of order: ${pairs.join(', ')}${rest}`));
  }
  content.push(el('div', { class: 'scroll' }, el('table', {},
    el('thead', {}, el('tr', {}, ...heads.map(([text, kind]) => el('th', { class: kind, scope: 'col' }, text)))),
    el('tbody', {}, ...body))));
  if (next !== null) {
    const more = el('button', { type: 'button' }, `more than these ${number(events.length)}`);
    more.addEventListener('click', () => {
      row.pages += 1;
      fetchDetails(row);
    });
    content.push(more);
  }
  const scrolled = row.details.querySelector('.scroll')?.scrollTop ?? 0;
  row.details.replaceChildren(...content);
  row.details.querySelector('.scroll').scrollTop = scrolled;
}

document.addEventListener('visibilitychange', () => {
  if (document.hidden) clearTimeout(timer);
  else ask();
});
new ResizeObserver(() => latest && list()).observe($('ticks'));
controls();
ask();
