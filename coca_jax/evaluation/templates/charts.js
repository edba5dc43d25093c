// uPlot charts. The cursor is synchronized across charts, and the legend shows the values under it.
// Drag to zoom in; double-click to reset.
const colour = name => () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const written = (_, value) => value == null ? '' : Number(value.toPrecision(4)).toLocaleString('en');
const plots = [...document.querySelectorAll('.chart')].map(figure => {
  const {unit, top, curves} = JSON.parse(figure.dataset.chart), place = figure.querySelector('div');
  const data = uPlot.join(curves.map(curve => [curve.x, curve.y])), steps = data[0];
  const size = () => ({width: place.clientWidth, height: 280});
  const axis = label => ({label, stroke: colour('--soft'), grid: {stroke: colour('--line'), width: 1}, ticks: {show: false}, font: '12px system-ui, sans-serif', labelFont: '12px system-ui, sans-serif', size: label === unit ? 60 : 36, labelSize: 18});
  const range = (plot, low, high) => {
    if (low == null) return [0, 1];
    const {min, max} = plot.scales.x, whole = min <= steps[0] && max >= steps[steps.length - 1];
    const floor = low >= 0 && low < 0.5 * high ? 0 : low;
    return uPlot.rangeNum(floor, whole && top != null ? top : high, 0.05, false);
  };
  const plot = new uPlot({
    ...size(),
    scales: {x: {time: false}, y: {range}},
    axes: [axis('step'), axis(unit)],
    cursor: {sync: {key: 'step'}},
    series: [{label: 'step'}, ...curves.map(curve => ({
      label: curve.name, stroke: colour(`--s${curve.colour}`), dash: curve.dash, width: curve.width,
      spanGaps: true, points: {show: curve.dots}, value: written,
    }))],
  }, data, place);
  new ResizeObserver(() => place.clientWidth && place.clientWidth !== plot.width && plot.setSize(size())).observe(place);
  return plot;
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => plots.forEach(plot => plot.redraw()));
