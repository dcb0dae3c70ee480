// The arithmetic of charts: round ticks, and fewer points than pixels without losing a peak.

/** Round numbers from at or below `low` to at or above `high`, about `wanted` of them. */
export function ticks(low, high, wanted) {
  const span = high > low ? high - low : Math.abs(high) || 1;
  const rough = span / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const first = Math.floor(low / step + 1e-9) * step;
  const found = [];
  for (let i = 0; first + (i - 1) * step < high - 1e-9 * span && i < 50; i += 1) found.push(first + i * step);
  if (found.length < 2) found.push(first + step);
  return found;
}

/** At most `most` of the points, in order: of each stretch the lowest and the highest, and always the first and the last. */
export function thinned(points, most) {
  if (points.length <= most) return points;
  const inner = points.slice(1, -1);
  const stretches = Math.max(1, Math.floor((most - 2) / 2));
  const kept = [points[0]];
  for (let i = 0; i < stretches; i += 1) {
    const stretch = inner.slice(Math.floor((i * inner.length) / stretches), Math.floor(((i + 1) * inner.length) / stretches));
    if (!stretch.length) continue;
    let low = 0;
    let high = 0;
    for (const [j, point] of stretch.entries()) {
      if (point[1] < stretch[low][1]) low = j;
      if (point[1] > stretch[high][1]) high = j;
    }
    for (const j of low === high ? [low] : [Math.min(low, high), Math.max(low, high)]) kept.push(stretch[j]);
  }
  return [...kept, points.at(-1)];
}
