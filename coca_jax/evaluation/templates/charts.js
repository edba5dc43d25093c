// Curves: values under the pointer; a range that is dragged, or the buttons, zoom in all charts
// over the same axis; a double click or Escape shows all again. Sizes: those of charts.py.
const PLOT = {left: 64, right: 536, top: 10, bottom: 236};
const written = v => {
  const size = Math.abs(v);
  if (Number.isInteger(v) || size >= 1000) return Math.round(v).toLocaleString('en');
  return size >= 0.001 ? String(Number(v.toPrecision(4))) : v.toExponential(1);
};
const rounded = (low, high) => {
  let step = 10 ** Math.floor(Math.log10((high - low) / 5));
  step *= [1, 2, 5, 10].reduce((a, b) => Math.abs((high - low) / (b * step) - 5) < Math.abs((high - low) / (a * step) - 5) ? b : a);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
};
// The part of a curve between two x, with its ends where it crosses them.
const between = (points, [a, b]) => {
  const found = [];
  points.forEach(([x, y], i) => {
    if (i && points[i - 1][0] < x) {
      const [u, v] = points[i - 1], at = s => [s, v + (y - v) * (s - u) / (x - u)];
      for (const s of [a, b]) if (u < s && s < x) found.push(at(s));
    }
    if (a <= x && x <= b) found.push([x, y]);
  });
  return found;
};
const charts = [...document.querySelectorAll('.chart')].map(figure => {
  const curves = JSON.parse(figure.dataset.points), svg = figure.querySelector(':scope > svg');
  const xs = curves.flat().map(p => p[0]), whole = [Math.min(...xs), Math.max(...xs)];
  const first = svg.innerHTML;  // as the page came
  return {figure, curves, svg, whole, view: whole, first, across: figure.dataset.across};
});
const draw = (chart, view) => {
  const {figure, svg, curves, whole} = chart;
  const [a, b] = [Math.max(view[0], whole[0]), Math.min(view[1], whole[1])];
  const shown = curves.map(points => between(points, [a, b]));
  if (!(a < b) || !shown.some(points => points.length > 1)) return;
  const all = a === whole[0] && b === whole[1];
  chart.view = [a, b];
  for (const button of figure.querySelectorAll('[data-zoom]'))
    button.hidden = all && button.dataset.zoom !== 'in';
  if (all) return void (svg.innerHTML = chart.first);
  const ys = shown.flat().map(p => p[1]), low = Math.min(...ys), high = Math.max(...ys);
  const room = 0.04 * (high - low) || 0.5 * Math.abs(high) || 1, [y0, y1] = [low - room, high + room];
  const px = x => (PLOT.left + (x - a) / (b - a) * (PLOT.right - PLOT.left)).toFixed(1);
  const py = y => (PLOT.bottom - (y - y0) / (y1 - y0) * (PLOT.bottom - PLOT.top)).toFixed(1);
  svg.querySelector('.ty').innerHTML = rounded(y0, y1).map(y =>
    `<line class="g" x1="${PLOT.left}" x2="${PLOT.right}" y1="${py(y)}" y2="${py(y)}"/><text x="${PLOT.left - 8}" y="${+py(y) + 4}" text-anchor="end">${written(y)}</text>`).join('');
  svg.querySelector('.tx').innerHTML = rounded(a, b).map(x =>
    `<text x="${px(x)}" y="${PLOT.bottom + 18}" text-anchor="middle">${written(x)}</text>`).join('');
  svg.querySelectorAll('.p').forEach(dot => dot.remove());
  svg.querySelectorAll('polyline').forEach((line, i) =>
    line.setAttribute('points', shown[i].map(([x, y]) => `${px(x)},${py(y)}`).join(' ')));
};
for (const chart of charts) {
  const {figure, svg, curves} = chart;
  const step = figure.querySelector('em'), values = figure.querySelectorAll('.legend b');
  const zoom = view => charts.filter(c => c.across === chart.across).forEach(c => draw(c, view));
  const at = event => {
    const box = svg.getBoundingClientRect(), [a, b] = chart.view;
    const px = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const share = Math.min(Math.max((px - PLOT.left) / (PLOT.right - PLOT.left), 0), 1);
    return a + share * (b - a);
  };
  const px = x => PLOT.left + (x - chart.view[0]) / (chart.view[1] - chart.view[0]) * (PLOT.right - PLOT.left);
  const mark = (...xs) => {
    const cursor = svg.querySelector('.cursor'), [u, v] = xs.length ? xs.map(px) : [-9];
    cursor.setAttribute('x', Math.min(u, v ?? u)); cursor.setAttribute('width', Math.abs((v ?? u) - u) || 1);
    cursor.classList.toggle('range', xs.length > 1);
  };
  let start = null;
  svg.addEventListener('pointerdown', event => {
    if (event.pointerType !== 'mouse' || event.button) return;  // a finger reads values and scrolls
    start = at(event);
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  svg.addEventListener('pointermove', event => {
    const x = at(event), [a, b] = chart.view;
    let nearest = null;
    curves.forEach((points, i) => {
      const seen = points.filter(p => a <= p[0] && p[0] <= b);
      const near = seen.length && seen.reduce((p, q) => Math.abs(q[0] - x) < Math.abs(p[0] - x) ? q : p);
      values[i].textContent = near ? near[1] : '';
      nearest ??= near || null;
    });
    step.textContent = nearest ? `${chart.across} ${nearest[0].toLocaleString('en')}` : '';
    if (start !== null) mark(start, x);
    else if (nearest) mark(nearest[0]);
  });
  const end = event => {
    const from = start;
    start = null;
    mark();
    if (from === null || event.type !== 'pointerup') return;
    const [a, b] = [from, at(event)].sort((u, v) => u - v);
    if (b - a > 0.02 * (chart.view[1] - chart.view[0])) zoom([a, b]);
  };
  svg.addEventListener('pointerup', end);
  svg.addEventListener('pointercancel', end);
  svg.addEventListener('pointerleave', () => {
    if (start !== null) return;
    mark();
    step.textContent = ''; values.forEach(v => v.textContent = '');
  });
  svg.addEventListener('dblclick', () => zoom(chart.whole));
  figure.addEventListener('keydown', event => { if (event.key === 'Escape') zoom(chart.whole); });
  for (const button of figure.querySelectorAll('[data-zoom]')) {
    button.hidden = button.dataset.zoom !== 'in';
    button.addEventListener('click', () => {
      const [a, b] = chart.view, quarter = (b - a) / 4, [low, high] = chart.whole;
      const by = {
        in: [a + quarter, b - quarter],
        out: [a - 2 * quarter, b + 2 * quarter],
        left: [Math.max(a - quarter, low), Math.max(a - quarter, low) + b - a],
        right: [Math.min(b + quarter, high) - (b - a), Math.min(b + quarter, high)],
      };
      zoom(by[button.dataset.zoom]);
      if (button.hidden) figure.querySelector('[data-zoom=in]').focus();
    });
  }
}
