for (const figure of document.querySelectorAll('.chart')) {
  const curves = JSON.parse(figure.dataset.points), svg = figure.querySelector(':scope > svg');
  const cursor = svg.querySelector('.cursor'), step = figure.querySelector('em');
  const values = figure.querySelectorAll('.legend b');
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    curves.forEach((points, i) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      values[i].textContent = near[2];
      if (i === 0) {
        cursor.setAttribute('x1', near[0]); cursor.setAttribute('x2', near[0]);
        step.textContent = 'step ' + near[1].toLocaleString();
      }
    });
  });
  svg.addEventListener('pointerleave', () => {
    cursor.setAttribute('x1', -9); cursor.setAttribute('x2', -9);
    step.textContent = ''; values.forEach(v => v.textContent = '');
  });
}
