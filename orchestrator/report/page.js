"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plot = document.getElementById("plot");
  const tip = document.getElementById("tip");
  const selects = Object.fromEntries(["x", "y", "color"].map((id) => [id, document.getElementById(id)]));
  const labels = Object.fromEntries(data.metrics.map((metric) => [metric.name, metric.label]));
  const direction = Object.fromEntries(data.objectives.map((o) => [o.name, o.direction]));
  const hidden = new Set();
  // viridis without its ends, which vanish on a dark or a light page
  const SCALE = [[88, 78, 166], [52, 109, 150], [33, 145, 140], [53, 183, 121], [144, 215, 67], [214, 226, 25]];
  const MARGIN = { top: 18, right: 22, bottom: 46, left: 62 };

  // -- small things ----------------------------------------------------------------------------

  function element(name, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function html(name, className, ...children) {
    const node = document.createElement(name);
    if (className) node.className = className;
    node.append(...children);
    return node;
  }

  function number(value) {
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)} G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)} M`;
    return size >= 1e4 ? value.toLocaleString("en") : String(+value.toPrecision(3));
  }

  const has = (point, metric) => Number.isFinite(point.metrics[metric]);

  // -- scales ----------------------------------------------------------------------------------

  /** Logarithm for values that span more than a factor of five, else the identity. */
  const bendOf = (low, high) => (low > 0 && high / low > 5 ? Math.log : (value) => value);

  /** Maps a metric's values to pixels. */
  function scaleOf(metric, points, from, to) {
    const values = points.flatMap((p) => [p.metrics[metric], ...(p.number ? p.intervals[metric] ?? [] : [])]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const bend = bendOf(low, high);
    const span = bend(high) - bend(low) || Math.abs(bend(high)) * 0.1 || 1;
    const [start, end] = [bend(low) - 0.07 * span, bend(high) + 0.07 * span];
    const scale = (value) => from + ((bend(value) - start) / (end - start)) * (to - from);
    scale.ticks = bend === Math.log ? logTicks(Math.exp(start), Math.exp(end)) : ticks(start, end);
    return scale;
  }

  function ticks(low, high) {
    const rough = (high - low) / 6;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  }

  function logTicks(low, high) {
    for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        found.push(...steps.map((s) => s * 10 ** power).filter((v) => v >= low && v <= high));
      if (found.length >= 4) return found;
    }
    return ticks(low, high);
  }

  function colorOf(metric, points) {
    const values = points.filter((p) => has(p, metric)).map((p) => p.metrics[metric]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const bend = bendOf(low, high);
    const share = (value) => (high > low ? (bend(value) - bend(low)) / (bend(high) - bend(low)) : 0.5);
    const color = (point) => {
      if (!metric || !has(point, metric)) return "var(--accent)";
      const place = share(point.metrics[metric]) * (SCALE.length - 1);
      const i = Math.min(Math.floor(place), SCALE.length - 2);
      return `rgb(${SCALE[i].map((c, k) => Math.round(c + (place - i) * (SCALE[i + 1][k] - c)))})`;
    };
    return Object.assign(color, { low, high });
  }

  // -- marks -----------------------------------------------------------------------------------

  const SHAPES = {
    circle: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
    square: (r) => `M${-r * 0.9} ${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}Z`,
    diamond: (r) => `M0 ${-r * 1.3}L${r * 1.3} 0L0 ${r * 1.3}L${-r * 1.3} 0Z`,
    triangle: (r) => `M0 ${-r * 1.2}L${r * 1.15} ${r * 0.9}H${-r * 1.15}Z`,
    cross: (r) => `M${-r * 0.4} ${-r * 1.2}h${r * 0.8}v${r * 0.8}h${r * 0.8}v${r * 0.8}h${-r * 0.8}v${r * 0.8}h${-r * 0.8}v${-r * 0.8}h${-r * 0.8}v${-r * 0.8}h${r * 0.8}Z`,
  };

  function kindOf(point) {
    if (point.over) return "over";
    if (point.number) return "front";
    return point.reference ? "reference" : "dominated";
  }

  function mark(point, color, x, y) {
    const kind = kindOf(point);
    const radius = kind === "dominated" ? 5 : 7.5;
    const node = element("path", {
      d: SHAPES[point.shape](radius),
      transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
      class: `mark ${kind}${point.reference ? " fixed" : ""}`,
      style: `--color: ${color(point)}`,
      tabindex: 0,
      role: "button",
      "aria-label": point.title,
    });
    node.addEventListener("pointerenter", () => showTip(point, x, y));
    node.addEventListener("focus", () => showTip(point, x, y));
    node.addEventListener("pointerleave", hideTip);
    node.addEventListener("blur", hideTip);
    node.addEventListener("click", () => openRow(point.id, true));
    node.addEventListener("keydown", (event) => event.key === "Enter" && openRow(point.id, true));
    return node;
  }

  // -- the picture -----------------------------------------------------------------------------

  function draw() {
    const [xName, yName, colorName] = ["x", "y", "color"].map((id) => selects[id].value);
    const points = data.points.filter((p) => has(p, xName) && has(p, yName) && !hidden.has(kindOf(p)));
    const width = plot.clientWidth;
    const height = Math.max(340, Math.min(540, width * 0.5));
    const svg = element("svg", { width, height, role: "group", "aria-label": `${labels[yName]} against ${labels[xName]}` });
    plot.replaceChildren(points.length ? svg : html("p", "note", "No point has both metrics."));
    if (!points.length) return;
    const x = scaleOf(xName, points, MARGIN.left, width - MARGIN.right);
    const y = scaleOf(yName, points, height - MARGIN.bottom, MARGIN.top);
    const color = colorOf(colorName, points);
    const box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    svg.append(hatch(), ...grid(x, y, box, xName, yName));
    for (const limit of data.limits) svg.append(...limitArea(limit, { [xName]: x }[limit.name], { [yName]: y }[limit.name], box));
    svg.append(...staircase(points, x, y, xName, yName, box));
    const order = ["dominated", "over", "reference", "front"];
    const sorted = [...points].sort((a, b) => order.indexOf(kindOf(a)) - order.indexOf(kindOf(b)));
    for (const point of sorted) if (point.number || point.reference) svg.append(...bars(point, x, y, xName, yName));
    const placed = sorted.map((point) => ({ point, x: x(point.metrics[xName]), y: y(point.metrics[yName]) }));
    for (const at of placed) svg.append(mark(at.point, color, at.x, at.y));
    svg.append(...names(placed, box));
    drawLegend(color, colorName);
  }

  function hatch() {
    const line = element("path", { d: "M0 8L8 0", class: "hatch" });
    return element("defs", {}, element("pattern", { id: "hatch", width: 8, height: 8, patternUnits: "userSpaceOnUse" }, line));
  }

  function grid(x, y, box, xName, yName) {
    const nodes = [];
    const text = (value, attributes) => nodes.push(element("text", attributes, value));
    for (const tick of x.ticks) {
      nodes.push(element("path", { d: `M${x(tick)} ${box.top}V${box.bottom}`, class: "grid" }));
      text(number(tick), { x: x(tick), y: box.bottom + 18, class: "tick", "text-anchor": "middle" });
    }
    for (const tick of y.ticks) {
      nodes.push(element("path", { d: `M${box.left} ${y(tick)}H${box.right}`, class: "grid" }));
      text(number(tick), { x: box.left - 8, y: y(tick) + 4, class: "tick", "text-anchor": "end" });
    }
    const better = (name, low, high) => ({ min: ` ${low} better`, max: ` ${high} better` })[direction[name]] ?? "";
    text(labels[xName] + better(xName, " ←", " →"), { x: box.right, y: box.bottom + 38, class: "axis", "text-anchor": "end" });
    text(labels[yName] + better(yName, " ↓", " ↑"), { x: box.left + 8, y: box.top + 10, class: "axis" });
    return nodes;
  }

  /** The part of the picture that a limit forbids. */
  function limitArea(limit, x, y, box) {
    const nodes = [];
    for (const side of ["min", "max"]) {
      if (limit[side] == null || !(x || y)) continue;
      const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
      const area = { ...box };
      if (x) area[side === "max" ? "left" : "right"] = clamp(x(limit[side]), box.left, box.right);
      if (y) area[side === "max" ? "bottom" : "top"] = clamp(y(limit[side]), box.top, box.bottom);
      const size = { x: area.left, y: area.top, width: area.right - area.left, height: area.bottom - area.top };
      nodes.push(element("rect", { ...size, class: "limit" }));
    }
    return nodes;
  }

  /** Steps through the shown points that no other shown point of the front beats in these two metrics. */
  function staircase(points, x, y, xName, yName, box) {
    if (!direction[xName] || !direction[yName] || xName === yName) return [];
    const at = points.filter((p) => p.number).map((p) => [x(p.metrics[xName]), y(p.metrics[yName])]);
    const right = direction[xName] === "max" ? 1 : -1;
    const up = direction[yName] === "max" ? -1 : 1;
    const beats = (a, b) => right * (a[0] - b[0]) >= 0 && up * (a[1] - b[1]) >= 0 && (a[0] !== b[0] || a[1] !== b[1]);
    const best = at.filter((a) => !at.some((b) => beats(b, a))).sort((a, b) => right * (b[0] - a[0]));
    if (!best.length) return [];
    const end = [right > 0 ? box.left : box.right, up < 0 ? box.bottom : box.top];
    const steps = best.map(([px, py], i) => (i ? `H${px}V${py}` : `M${px} ${end[1]}V${py}`)).join("");
    return [element("path", { d: `${steps}H${end[0]}`, class: "stairs" })];
  }

  function bars(point, x, y, xName, yName) {
    const [px, py] = [x(point.metrics[xName]), y(point.metrics[yName])];
    const across = point.intervals[xName];
    const up = point.intervals[yName];
    const nodes = [];
    if (across) nodes.push(element("path", { d: `M${x(across[0])} ${py}H${x(across[1])}`, class: "bar-line" }));
    if (up) nodes.push(element("path", { d: `M${px} ${y(up[0])}V${y(up[1])}`, class: "bar-line" }));
    return nodes;
  }

  /** Numbers of front points and names of references, each beside its mark where there is room. */
  function names(placed, box) {
    const taken = placed.map((at) => ({ left: at.x - 8, right: at.x + 8, top: at.y - 8, bottom: at.y + 8 }));
    const overlap = (a, b) => Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left)) * Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
    const outside = (a) => a.left < box.left || a.right > box.right || a.top < box.top || a.bottom > box.bottom;
    return placed.filter(({ point }) => point.number || point.reference).map(({ point, x, y }) => {
      const text = [point.number ? `${point.number}` : "", point.reference ? point.title : ""].filter(Boolean).join(" · ");
      const width = text.length * 6.6 + 2;
      const spots = [[12, 4], [-12 - width, 4], [-width / 2, -13], [-width / 2, 22], [10, -9], [10, 17], [-10 - width, -9], [-10 - width, 17]];
      const boxes = spots.map(([dx, dy]) => ({ left: x + dx, right: x + dx + width, top: y + dy - 11, bottom: y + dy + 2 }));
      const cost = boxes.map((b) => taken.reduce((sum, t) => sum + overlap(b, t), outside(b) ? 1e4 : 0));
      const best = cost.indexOf(Math.min(...cost));
      taken.push(boxes[best]);
      return element("text", { x: boxes[best].left, y: boxes[best].bottom - 2, class: `name ${kindOf(point)}` }, text);
    });
  }

  // -- legend and tooltip ----------------------------------------------------------------------

  function drawLegend(color, colorName) {
    const legend = document.getElementById("legend");
    const kinds = [["front", "on the front"], ["dominated", "dominated"], ["over", "over a limit"]];
    const swatch = (shape, kind) => {
      const path = element("path", { d: SHAPES[shape](6), transform: "translate(9 9)", class: `mark ${kind}`, style: "--color: var(--accent)" });
      return element("svg", { width: 18, height: 18, "aria-hidden": "true" }, path);
    };
    const items = kinds.filter(([kind]) => data.points.some((p) => kindOf(p) === kind)).map(([kind, words]) => {
      const item = html(kind === "front" ? "span" : "button", "key", swatch("circle", kind), words);
      if (kind === "front") return item;
      item.type = "button";
      item.setAttribute("aria-pressed", String(!hidden.has(kind)));
      item.addEventListener("click", () => {
        hidden.has(kind) ? hidden.delete(kind) : hidden.add(kind);
        draw();
      });
      return item;
    });
    if (data.points.some((p) => p.reference)) {
      const shapes = [...new Set(data.points.filter((p) => p.reference).map((p) => p.shape))];
      items.push(html("span", "key", ...shapes.map((shape) => swatch(shape, "reference")), "references"));
    }
    if (colorName) {
      const stops = SCALE.map((c) => `rgb(${c})`).join(", ");
      const ramp = html("span", "ramp");
      ramp.style.background = `linear-gradient(to right, ${stops})`;
      items.push(html("span", "key end", `${labels[colorName]}  ${number(color.low)}`, ramp, number(color.high)));
    }
    legend.replaceChildren(...items);
  }

  function showTip(point, x, y) {
    const shown = [...new Set([...data.objectives.map((o) => o.name), ...Object.values(selects).map((s) => s.value)])];
    const rows = shown.filter((name) => point.words[name]).map((name) => {
      const [value, interval, versus] = point.words[name];
      return html("tr", "", html("th", "", labels[name]), html("td", "", value), html("td", "sub", versus), html("td", "sub", interval));
    });
    const head = html("p", "tip-title", (point.number ? `#${point.number} · ` : "") + point.title);
    const config = point.config === point.title ? "" : html("p", "sub", point.config);
    const state = point.over ? html("p", "sub", "over a limit") : "";
    tip.replaceChildren(head, config, state, html("table", "", html("tbody", "", ...rows)));
    tip.hidden = false;
    const left = x + 18 + tip.offsetWidth > plot.clientWidth ? x - tip.offsetWidth - 18 : x + 18;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${Math.max(0, Math.min(y - tip.offsetHeight / 2, plot.clientHeight - tip.offsetHeight))}px`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  // -- tables ----------------------------------------------------------------------------------

  function openRow(id, jump) {
    const body = document.getElementById(`point-${id}`);
    const button = body.querySelector(".toggle");
    const open = jump || button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    body.classList.toggle("open", open);
    if (jump) unfold(body.dataset.group);
    if (jump) body.scrollIntoView({ behavior: "smooth", block: "center" });
  }

  /** Show the points of a group that is folded away. */
  function unfold(group) {
    for (const body of document.querySelectorAll(`.point[data-group="${group}"]`)) body.hidden = false;
    document.querySelector(`[data-unfold="${group}"]`)?.remove();
  }

  async function copy(button) {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
    } catch {
      // a page opened as a file may have no clipboard: leave the command selected instead
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "Selected";
      return;
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  function filterTrials(chosen) {
    for (const button of document.querySelectorAll(".filters button"))
      button.setAttribute("aria-pressed", String(button === chosen));
    for (const row of document.querySelectorAll(".trials tbody tr"))
      row.hidden = Boolean(chosen.dataset.status) && row.dataset.status !== chosen.dataset.status;
  }

  // -- start -----------------------------------------------------------------------------------

  for (const [id, select] of Object.entries(selects)) {
    if (id === "color") select.add(new Option("none", ""));
    for (const metric of data.metrics) select.add(new Option(metric.label, metric.name));
    select.value = data.axes[id];
    select.addEventListener("change", draw);
  }
  document.addEventListener("click", ({ target }) => {
    if (target.matches(".toggle")) openRow(target.getAttribute("aria-controls").slice("more-".length), false);
    if (target.matches("[data-unfold]")) unfold(target.dataset.unfold);
    if (target.matches("[data-copy]")) copy(target);
    if (target.matches(".filters button")) filterTrials(target);
  });
  new ResizeObserver(draw).observe(plot);
})();
