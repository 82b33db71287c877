// One schedule on one canvas: a ruler, and for each rank a lane of operations above its memory curve.
const LEFT = 58, RIGHT = 112, TOP = 20, DIM = 0.16;

class Panel {
  constructor(schedule, state) {
    this.schedule = schedule;
    this.state = state;
    this.element = document.createElement("div");
    this.element.className = "panel";
    const title = document.createElement("h2");
    title.textContent = schedule.name + " ";
    const line = document.createElement("span");
    line.textContent = schedule.line;
    title.append(line);
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `Timeline of ${schedule.name}: ${schedule.line}`);
    this.element.append(title, this.canvas);
    this.strip = document.createElement("canvas");
    this.base = document.createElement("canvas");
    this.drawn = NONE;
  }

  resize(height) {
    const { state, schedule } = this;
    const smallest = state.memory ? 15 : 7;
    this.lane = Math.max(smallest, Math.min(state.memory ? 64 : 40, Math.floor((height - TOP) / schedule.ranks)));
    this.memoryHeight = state.memory ? Math.floor(this.lane * (this.lane >= 20 ? 0.38 : 0.3)) : 0;
    this.sideHeight = schedule.lanes.some((lane) => lane.side.length) ? Math.max(2, Math.floor(this.lane * 0.16)) : 0;
    this.opsHeight = this.lane - this.memoryHeight - this.sideHeight - (this.lane > 12 ? 2 : 1);
    this.width = this.canvas.clientWidth;
    this.height = TOP + this.lane * schedule.ranks;
    this.plot = Math.max(50, this.width - LEFT - RIGHT);
    const dots = window.devicePixelRatio || 1;
    this.canvas.style.height = `${this.height}px`;
    this.canvas.width = Math.round(this.width * dots);
    this.canvas.height = Math.round(this.height * dots);
    this.dots = dots;
    this.base.width = this.canvas.width;
    this.base.height = this.canvas.height;
  }

  x(time) {
    return LEFT + ((time - this.state.from) / (this.state.to - this.state.from)) * this.plot;
  }

  time(x) {
    return this.state.from + ((x - LEFT) / this.plot) * (this.state.to - this.state.from);
  }

  top(rank) {
    return TOP + rank * this.lane;
  }

  // Everything but the marks is kept, so that moving the pointer draws little.
  draw() {
    if (this.drawn !== this.state.version) {
      this.drawn = this.state.version;
      this.drawBase(this.base.getContext("2d"));
    }
    const g = this.canvas.getContext("2d");
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.drawImage(this.base, 0, 0);
    g.setTransform(this.dots, 0, 0, this.dots, 0, 0);
    g.save();
    this.clip(g);
    this.marks(g);
    g.restore();
  }

  drawBase(g) {
    g.setTransform(this.dots, 0, 0, this.dots, 0, 0);
    g.fillStyle = palette.back;
    g.fillRect(0, 0, this.width, this.height);
    g.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    g.textBaseline = "middle";
    this.gutters(g);
    this.ruler(g);
    g.save();
    this.clip(g);
    this.labels = [];
    this.visible = 0;
    for (let rank = 0; rank < this.schedule.ranks; rank++) this.drawLane(g, rank);
    this.limit(g);
    this.write(g);
    if (this.state.messages) this.links(g);
    if (this.state.critical) this.path(g);
    g.restore();
  }

  clip(g) {
    g.beginPath();
    g.rect(LEFT, 0, this.plot, this.height);
    g.clip();
  }

  ruler(g) {
    const { from, to } = this.state;
    const rough = ((to - from) * 90) / this.plot, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    g.textAlign = "center";
    for (let n = Math.ceil(from / step); n * step <= to; n++) {
      const x = this.x(n * step);
      g.fillStyle = palette.line;
      g.fillRect(x, TOP - 5, 1, this.height);
      g.fillStyle = palette.soft;
      g.fillText(shown(n * step), x, TOP / 2 - 1);
    }
    const end = this.x(this.schedule.makespan);
    if (end < LEFT || end > LEFT + this.plot) return;
    g.fillStyle = palette.ink;
    g.fillRect(end, TOP - 5, 1, this.height);
  }

  gutters(g) {
    const { schedule, lane } = this;
    const every = Math.ceil(13 / lane);
    for (let rank = 0; rank < schedule.ranks; rank++) {
      const y = this.top(rank), middle = y + Math.min(this.opsHeight, lane - 1) / 2;
      g.fillStyle = palette.lane;
      g.fillRect(LEFT, y, this.plot, lane - 1);
      if (rank % every) continue;
      g.fillStyle = palette.soft;
      g.textAlign = "right";
      g.fillText(`rank ${rank}`, LEFT - 7, middle);
      g.textAlign = "left";
      g.fillText(`${((100 * schedule.busy[rank]) / schedule.makespan).toFixed(1)}%`, this.width - RIGHT + 16, middle);
      g.fillText(shown(Number(schedule.peak[rank].toPrecision(4))), this.width - RIGHT + 66, middle);
    }
    g.fillStyle = palette.soft;
    g.textAlign = "left";
    g.fillText("busy", this.width - RIGHT + 16, TOP / 2 - 1);
    g.fillText("peak", this.width - RIGHT + 66, TOP / 2 - 1);
  }

  // Operations at least two dots wide are rectangles; narrower ones add up, dot by dot, to a mixed colour.
  drawLane(g, rank) {
    const { schedule, state } = this, { start, end } = schedule;
    const y = this.top(rank), lane = schedule.lanes[rank];
    const columns = Math.round(this.plot * this.dots), scale = columns / (state.to - state.from);
    let sums = null;
    const rows = lane.main;
    for (let i = Math.max(0, firstFrom(rows, (row) => start[row], state.from) - 2); i < rows.length; i++) {
      const row = rows[i];
      if (start[row] >= state.to) break;
      if (end[row] <= state.from) continue;
      const left = (start[row] - state.from) * scale, right = (end[row] - state.from) * scale;
      const strong = this.lit(row) ? 1 : DIM, colour = tint(schedule, row);
      if (right - left >= 2) {
        this.box(g, row, LEFT + left / this.dots, (right - left) / this.dots, y, colour, strong);
        this.visible++;
      } else {
        sums ??= new Float32Array(columns * 4);
        for (let column = Math.max(0, Math.floor(left)); column < right && column < columns; column++) {
          const covered = strong * (Math.min(right, column + 1) - Math.max(left, column));
          for (let part = 0; part < 3; part++) sums[column * 4 + part] += covered * colour.rgb[part];
          sums[column * 4 + 3] += covered;
        }
      }
    }
    if (sums) this.blend(g, sums, columns, y);
    this.side(g, lane.side, y + this.opsHeight);
    if (this.memoryHeight > 2) this.curve(g, rank, y + this.opsHeight + this.sideHeight + 1, this.memoryHeight);
  }

  box(g, row, x, width, y, colour, strong) {
    const half = this.schedule.half[row], height = half ? this.opsHeight / 2 : this.opsHeight;
    const top = half === 2 ? y + height : y;
    g.globalAlpha = strong;
    g.fillStyle = colour.fill;
    g.fillRect(x, top, width > 4 ? width - 1 : width > 2 ? width - 0.5 : width, height);
    g.globalAlpha = 1;
    if (height >= 10 && width >= 9 && strong === 1) this.labels.push({ row, x, width, y: top + height / 2, colour: colour.text });
  }

  blend(g, sums, columns, y) {
    const image = new ImageData(columns, 1);
    for (let column = 0; column < columns; column++) {
      const covered = sums[column * 4 + 3];
      if (!covered) continue;
      for (let part = 0; part < 3; part++) image.data[column * 4 + part] = sums[column * 4 + part] / covered;
      image.data[column * 4 + 3] = 255 * Math.min(1, covered);
    }
    this.strip.width = columns;
    this.strip.height = 1;
    this.strip.getContext("2d").putImageData(image, 0, 0);
    g.imageSmoothingEnabled = false;
    g.drawImage(this.strip, 0, 0, columns, 1, LEFT, y, this.plot, this.opsHeight);
  }

  side(g, rows, y) {
    const { schedule, state } = this;
    for (let i = Math.max(0, firstFrom(rows, (row) => schedule.start[row], state.from) - 2); i < rows.length; i++) {
      const row = rows[i];
      if (schedule.start[row] >= state.to) break;
      const x = this.x(schedule.start[row]);
      g.globalAlpha = this.lit(row) ? 1 : DIM;
      g.fillStyle = tint(schedule, row).fill;
      g.fillRect(x, y, Math.max(1, this.x(schedule.end[row]) - x - 0.5), this.sideHeight);
    }
    g.globalAlpha = 1;
  }

  // Names as full as fits every operation that has room for any: 2F7, F7 or 7.
  write(g) {
    const { schedule, plot } = this;
    const several = schedule.chunks * schedule.placement.length > 1;
    const forms = (row) => {
      const full = token(schedule, row), number = String(schedule.microbatch[row]), short = KINDS[schedule.kind[row]] + number;
      return several ? [full, short, number] : [short, number];
    };
    const fits = (label, width) => label.length * 6.6 + 2 <= width;
    let level = 0;
    for (const { row, width } of this.labels) level = Math.max(level, forms(row).findIndex((label) => fits(label, width)));
    g.textAlign = "center";
    for (const { row, x, width, y, colour } of this.labels) {
      const left = Math.max(x, LEFT), right = Math.min(x + width, LEFT + plot);
      const label = forms(row)[level];
      if (!fits(label, right - left)) continue;
      g.fillStyle = colour;
      g.fillText(label, (left + right - 1) / 2, y + 0.5);
    }
  }

  curve(g, rank, y, height) {
    const { memoryAt, memory, memoryOffsets } = this.schedule, { from, to } = this.state;
    const first = memoryOffsets[rank], last = memoryOffsets[rank + 1];
    let i = first, high = last;
    while (i < high) {
      const middle = (i + high) >> 1;
      if (memoryAt[middle] <= from) i = middle + 1;
      else high = middle;
    }
    const level = (value) => y + height - (value / header.memory_top) * height;
    let value = i > first ? memory[i - 1] : 0, most = value, x = LEFT;
    g.beginPath();
    g.moveTo(LEFT, y + height);
    for (; i < last && memoryAt[i] <= to; i++) {
      const next = this.x(memoryAt[i]);
      if (next - x >= 0.7) {  // changes within a dot are drawn as one line up to the most of them
        g.lineTo(x, level(most));
        g.lineTo(x, level(value));
        g.lineTo(next, level(value));
        x = next;
        most = memory[i];
      }
      value = memory[i];
      most = Math.max(most, value);
    }
    g.lineTo(x, level(most));
    g.lineTo(x, level(value));
    const end = Math.min(LEFT + this.plot, this.x(this.schedule.makespan));
    g.lineTo(end, level(value));
    g.lineTo(end, y + height);
    g.globalAlpha = 0.75;
    g.fillStyle = palette.hold;
    g.fill();
    g.globalAlpha = 1;
  }

  limit(g) {
    if (header.memory_limit === null || this.memoryHeight < 4) return;
    g.fillStyle = palette.mark;
    g.globalAlpha = 0.5;
    for (let rank = 0; rank < this.schedule.ranks; rank++) {
      const bottom = this.top(rank) + this.opsHeight + this.sideHeight + 1 + this.memoryHeight;
      g.fillRect(LEFT, bottom - (header.memory_limit / header.memory_top) * this.memoryHeight, this.plot, 1);
    }
    g.globalAlpha = 1;
  }

  // Whether an operation keeps its full colour.
  lit(row) {
    const { state, schedule } = this;
    if (state.critical) return schedule.onPath[row] === 1;
    if (state.kind !== NONE) return schedule.kind[row] === state.kind;
    if (state.selected) return schedule.microbatch[row] === state.selected.microbatch || state.selected.microbatch < 0;
    return true;
  }

  middle(row) {
    const half = this.schedule.half[row];
    const part = half ? (half === 1 ? 0.25 : 0.75) : 0.5;
    return this.top(rankOf(this.schedule, row)) + this.opsHeight * part;
  }

  link(g, from, to) {
    g.beginPath();
    g.moveTo(this.x(this.schedule.end[from]) - 1, this.middle(from));
    g.lineTo(this.x(this.schedule.start[to]) + 1, this.middle(to));
    g.stroke();
  }

  links(g) {
    if (this.visible > 6000) return;
    const { schedule, state } = this;
    g.strokeStyle = palette.ink;
    g.globalAlpha = 0.35;
    for (const lane of schedule.lanes) {
      for (const row of lane.main) {
        const source = schedule.source[row];
        if (source === NONE || schedule.start[row] < state.from || schedule.end[source] > state.to) continue;
        if (rankOf(schedule, source) !== rankOf(schedule, row)) this.link(g, source, row);
      }
    }
    g.globalAlpha = 1;
  }

  path(g) {
    g.strokeStyle = palette.mark;
    g.lineWidth = 1.6;
    const { critical } = this.schedule;
    for (let i = 1; i < critical.length; i++) {
      if (this.schedule.end[critical[i]] >= this.state.from) this.link(g, critical[i - 1], critical[i]);
    }
    g.lineWidth = 1;
  }

  outline(g, row, width) {
    const { schedule } = this, half = schedule.half[row];
    const height = half ? this.opsHeight / 2 : this.opsHeight, y = this.top(rankOf(schedule, row)) + (half === 2 ? height : 0);
    g.lineWidth = width;
    g.strokeRect(this.x(schedule.start[row]) - 0.5, y - 0.5, this.x(schedule.end[row]) - this.x(schedule.start[row]), height + 1);
    g.lineWidth = 1;
  }

  marks(g) {
    const { state, schedule } = this;
    if (state.pointed !== null) {
      g.fillStyle = palette.soft;
      g.fillRect(this.x(state.pointed), 0, 1, this.height);
    }
    const focus = state.hover?.panel === this ? state.hover : state.selected?.panel === this ? state.selected : null;
    if (state.selected?.panel === this) {
      g.strokeStyle = palette.ink;
      this.outline(g, state.selected.row, 2);
    }
    if (focus) {
      g.strokeStyle = palette.mark;
      g.lineWidth = 1.6;
      if (schedule.cause[focus.row] !== NONE) this.link(g, schedule.cause[focus.row], focus.row);
      for (let row = 0; row < schedule.cause.length; row++) if (schedule.cause[row] === focus.row) this.link(g, focus.row, row);
      this.outline(g, focus.row, 1.6);
    }
    if (state.range) {
      const [left, right] = state.range.map((time) => this.x(time));
      g.globalAlpha = 0.15;
      g.fillStyle = palette.mark;
      g.fillRect(left, 0, right - left, this.height);
      g.globalAlpha = 1;
    }
  }

  // The operation at a place of the canvas, NONE where the rank idles.
  at(x, y) {
    const rank = Math.floor((y - TOP) / this.lane);
    if (rank < 0 || rank >= this.schedule.ranks || x < LEFT || x > LEFT + this.plot) return NONE;
    const { start, end, half, lanes } = this.schedule, time = this.time(x), down = y - this.top(rank);
    const onSide = this.sideHeight && down >= this.opsHeight && down < this.opsHeight + this.sideHeight + 1;
    const rows = onSide ? lanes[rank].side : lanes[rank].main;
    const after = firstFrom(rows, (row) => start[row], time + 1e-12);
    for (const row of [rows[after - 1], rows[after - 2]]) {
      if (row === undefined || end[row] < time) continue;
      if (!half[row] || onSide || (half[row] === 2) === down > this.opsHeight / 2) return row;
    }
    return NONE;
  }
}
