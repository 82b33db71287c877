// Colours from the style sheet, paler for each further chunk or replica of a rank.
let palette = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => {
    const hex = style.getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  };
  palette = { kinds: KINDS.map((name) => (style.getPropertyValue(`--${name}`) ? colour(name) : [128, 128, 128])), cache: new Map() };
  for (const name of ["back", "lane", "ink", "soft", "line", "mark", "hold"]) palette[name] = style.getPropertyValue(`--${name}`).trim();
  palette.ground = colour("lane");
}

function tint(schedule, row) {
  const kind = schedule.kind[row], stage = schedule.stage[row], microbatch = schedule.microbatch[row];
  const voice = microbatch >= 0 && microbatch < schedule.voice.length ? schedule.voice[microbatch] : 0;
  const tone = stage >= 0 && stage < schedule.stages ? schedule.tone[voice][stage] : 0;
  const key = kind * 4096 + tone;
  let found = palette.cache.get(key);
  if (!found) {
    const pale = schedule.tones > 1 ? (header.paler * tone) / (schedule.tones - 1) : 0;
    const rgb = palette.kinds[kind].map((part, at) => Math.round(part + (palette.ground[at] - part) * pale));
    const bright = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255;
    found = { rgb, fill: `rgb(${rgb})`, text: bright > 0.58 ? "#14171b" : "#ffffff" };
    palette.cache.set(key, found);
  }
  return found;
}
