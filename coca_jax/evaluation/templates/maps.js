// Embedding maps: shows the image of the dot nearest to the pointer or selected with the slider.
for (const map of document.querySelectorAll('.map')) {
  const svg = map.querySelector('.ground svg'), dots = [...svg.querySelectorAll('circle')];
  const large = map.querySelector('.large'), what = map.querySelector('.what');
  const [slider, pictures] = map.querySelectorAll('input'), size = map.dataset.size;
  const [, , width, height] = svg.getAttribute('viewBox').split(' ').map(Number);
  const at = dot => [+dot.getAttribute('cx'), +dot.getAttribute('cy')];
  let chosen = 0, zoom = 1;
  const choose = number => {
    chosen = number;
    const dot = dots[number], {text, sheet} = dot.dataset;
    dots.forEach(other => {
      other.classList.toggle('chosen', other === dot);
      other.classList.toggle('same', other !== dot && other.dataset.text === text);
    });
    large.setAttribute('viewBox', `${sheet} ${size} ${size}`);
    what.textContent = text;
    slider.value = number;
    slider.setAttribute('aria-valuetext', text);
  };
  const center = (x, y) => {
    const [w, h] = [width / zoom, height / zoom];
    const [left, top] = [Math.min(Math.max(x - w / 2, 0), width - w), Math.min(Math.max(y - h / 2, 0), height - h)];
    svg.setAttribute('viewBox', `${left} ${top} ${w} ${h}`);
    svg.style.setProperty('--z', zoom);
    svg.querySelectorAll('.small').forEach((small, i) => {
      const [cx, cy] = at(dots[i]), side = (small.dataset.side ??= small.getAttribute('width')) / zoom ** 0.5;
      for (const [name, value] of Object.entries({x: cx - side / 2, y: cy - side / 2, width: side, height: side})) small.setAttribute(name, value);
    });
  };
  const near = event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = 0, least = Infinity;
    dots.forEach((dot, i) => {
      const [x, y] = at(dot), far = (x - point.x) ** 2 + (y - point.y) ** 2;
      if (far < least) [best, least] = [i, far];
    });
    choose(best);
  };
  svg.addEventListener('pointermove', near);
  svg.addEventListener('pointerdown', near);
  slider.addEventListener('input', () => choose(+slider.value));
  pictures.addEventListener('change', () => map.classList.toggle('pictured', pictures.checked));
  for (const button of map.querySelectorAll('[data-by]'))
    button.addEventListener('click', () => {
      zoom = Math.min(Math.max(zoom * button.dataset.by, 1), 16);
      center(...at(dots[chosen]));
    });
  map.querySelector('.steer').hidden = false;
  choose(0);
}
