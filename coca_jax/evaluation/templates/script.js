// Collapse long sections on small screens.
if (matchMedia('(max-width: 600px)').matches) {
  for (const fold of document.querySelectorAll('.fold')) fold.open = false;
}

// Attention of a word: darkens the parts of the image with low attention.
for (const seen of document.querySelectorAll('.seen')) {
  const canvas = seen.querySelector('canvas'), img = seen.querySelector('img');
  const words = [...seen.parentElement.querySelectorAll('.word')];
  const pressed = () => words.find(word => word.ariaPressed === 'true');
  const show = word => {
    canvas.hidden = !word;
    if (!word) return;
    const map = Uint8Array.from(atob(word.dataset.map), c => c.charCodeAt(0)), across = +word.dataset.columns || Math.sqrt(map.length), down = map.length / across;
    const small = Object.assign(document.createElement('canvas'), {width: across, height: down});
    const dark = new ImageData(across, down);
    map.forEach((value, i) => dark.data.set([8, 12, 24, 215 * (1 - (value / 255) ** 0.8)], 4 * i));
    small.getContext('2d').putImageData(dark, 0, 0);
    // The box letterboxes the image. The attention map covers the entire image, or only its center
    // crop if the model crops its input.
    const box = img.clientWidth, scale = box / Math.max(img.naturalWidth, img.naturalHeight);
    const sides = [img.naturalWidth * scale, img.naturalHeight * scale];
    const aspect = +seen.dataset.aspect || 1, high = Math.min(sides[0] / aspect, sides[1]);
    const [w, h] = seen.dataset.fit === 'crop' ? [high * aspect, high] : sides;
    Object.assign(canvas, {width: 2 * w, height: 2 * h});
    Object.assign(canvas.style, {width: w + 'px', height: h + 'px', left: (box - w) / 2 + 'px', top: (box - h) / 2 + 'px'});
    canvas.getContext('2d').drawImage(small, 0, 0, 2 * w, 2 * h);
  };
  for (const word of words) {
    word.addEventListener('click', () => {
      const was = word.ariaPressed === 'true';
      words.forEach(other => other.ariaPressed = 'false');
      word.ariaPressed = String(!was);
      show(was ? null : word);
    });
    word.addEventListener('mouseenter', () => show(word));
    word.addEventListener('mouseleave', () => show(pressed()));
  }
}
