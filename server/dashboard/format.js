// Numbers, times and digests as people read them. Absent values are a dash, never "null" or "NaN".

const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const time = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clockTime = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

const absent = (value) => value === null || value === undefined || !Number.isFinite(value);

export function count(value) {
  return absent(value) ? NONE : whole.format(value);
}

/** "1 probe", "2 probes". */
export function counted(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** A loss in nats per token. */
export function loss(value) {
  return absent(value) ? NONE : value.toFixed(Math.abs(value) < 100 ? 4 : 1);
}

/** Four significant digits, for learning rates and slopes. */
export function figure(value) {
  return absent(value) ? NONE : Number(value.toPrecision(4)).toString();
}

export function percent(share) {
  return absent(share) ? NONE : `${Math.round(100 * share)} %`;
}

export function size(bytes) {
  if (absent(bytes)) return NONE;
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = bytes < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${power && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

export function duration(seconds) {
  if (absent(seconds)) return NONE;
  const s = Math.abs(seconds);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 100) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 129600 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

export function ago(at, now = Date.now() / 1000) {
  if (absent(at)) return "never";
  return now - at < 5 ? "just now" : `${duration(Math.round(now - at))} ago`;
}

export function date(at) {
  return absent(at) ? NONE : time.format(new Date(1000 * at));
}

export function clock(at) {
  return absent(at) ? NONE : clockTime.format(new Date(1000 * at));
}

/** The first characters of a digest; the whole stands in the title of what shows it. */
export function short(digest) {
  return digest ? digest.slice(0, 12) : NONE;
}
