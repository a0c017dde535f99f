"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const byId = (id) => document.getElementById(id);
  const announce = byId("announce");

  /* --- numbers ------------------------------------------------------------------------------------ */

  const WORDS = { nan: "NaN", inf: "+Inf", "-inf": "−Inf" };

  // Four significant digits; "0" only for zero.
  function number(value) {
    if (value === null || value === undefined) return "not measured";
    if (typeof value === "string") return WORDS[value] || value;
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace("e+", "e").replace("-", "−");
    if (size >= 1e4) return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, " ").replace("-", "−");
    return Number(value.toPrecision(4)).toString().replace("-", "−");
  }

  // Three digits, for the cells themselves.
  function short(value) {
    return number(typeof value === "number" && value !== 0 ? Number(value.toPrecision(3)) : value);
  }

  function amount(value, unit) {
    return number(value) + (unit && typeof value === "number" ? " " + unit : "");
  }

  /* --- colours ------------------------------------------------------------------------------------ */

  const data = byId("heads-data") ? JSON.parse(byId("heads-data").textContent) : null;
  const STOPS = ["#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"]
    .map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));

  function colour(share) {
    const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
    const below = Math.min(Math.floor(place), STOPS.length - 2);
    return STOPS[below].map((channel, at) => Math.round(channel + (STOPS[below + 1][at] - channel) * (place - below)));
  }

  // Black or white, whichever has the higher contrast (never below 4.5 to 1).
  function ink(rgb) {
    const [r, g, b] = rgb.map((channel) => {
      const c = channel / 255;
      return c <= 0.04045 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4);
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  }

  function share(value, scale) {
    if (value === "inf") return 1;
    if (value === "-inf") return 0;
    if (value <= scale.low) return 0;
    if (value >= scale.high) return 1;
    if (scale.log) return Math.log(value / scale.low) / Math.log(scale.high / scale.low);
    return (value - scale.low) / (scale.high - scale.low);
  }

  // What a cell is drawn as: undefined is no cell, null was not measured.
  function sign(value, scale) {
    if (value === undefined) return "";
    if (value === null) return "none";
    if (value === "nan") return "nan";
    if (scale.overflows && (value === "-inf" || value < 0)) return "over";
    return "number";
  }

  /* --- one heat map ------------------------------------------------------------------------------- */

  const STEPS = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024];

  function element(tag, name, parent) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (parent) parent.append(made);
    return made;
  }

  // model: rows, columns (labels), corner, label, scale(), value(row, column), outlined(row, column),
  // flagged(row), say(row, column) → a sentence, show(row, column, readout), roomy: largest cell, turned, square
  function heatMap(host, model) {
    const rows = model.rows.length;
    const columns = model.columns.length;
    const box = element("div", "heat-box", host);
    const grid = element("div", "heat-grid", box);
    const corner = element("div", "heat-corner", grid);
    const top = element("div", "heat-cols", grid);
    const left = element("div", "heat-rows", grid);
    const plane = element("div", "heat-plane", grid);
    const canvas = element("canvas", "", plane);
    const cursor = element("div", "heat-cursor", plane);
    const readout = byId(model.readout);
    corner.textContent = model.corner;
    cursor.hidden = true;
    canvas.setAttribute("aria-hidden", "true");
    plane.tabIndex = 0;
    plane.setAttribute("role", "application");
    plane.setAttribute("aria-roledescription", "heat map");
    plane.setAttribute("aria-label", model.label);
    if (byId("keys")) plane.setAttribute("aria-describedby", "keys");
    let wide = 8;
    let high = 8;
    let dense = 1;
    let at = null;

    function layOut(space, tall, least, finest) {
      dense = Math.max(window.devicePixelRatio || 1, finest);
      const longest = Math.max(model.corner.length, ...model.rows.map((name) => name.length));
      const labels = Math.min(longest * 7.2 + 16, Math.max(72, space * 0.4));
      const tallest = Math.max(0, ...model.columns.map((name) => name.length));
      wide = Math.max(least, Math.min(model.roomy, Math.floor((space - labels - 6) / Math.max(columns, 1))));
      const usual = model.square ? wide : rows <= 24 ? 28 : rows <= 64 ? 18 : 13;
      high = Math.max(3, Math.min(usual, Math.floor(tall / Math.max(rows, 1))));
      const turned = tallest * 7.2 > wide && model.turned;
      left.style.width = corner.style.width = labels + "px";
      top.style.height = (turned ? Math.min(tallest * 7.2 + 8, 200) : 18) + "px";
      left.style.position = "sticky";
      axis(left, model.rows, high, 12, (span, place) => { span.style.top = place + "px"; });
      axis(top, model.columns, wide, turned ? 12 : tallest * 7.2 + 6, (span, place) => {
        span.style.left = place + "px";
        span.classList.add(turned ? "tall" : "flat");
      });
      left.querySelectorAll("span").forEach((span) => {
        if (model.flagged && model.flagged(Number(span.dataset.at))) {
          span.classList.add("flagged");
          span.textContent = "! " + span.textContent;
        }
      });
      draw();
      place();
    }

    // As many labels as there is room for, at an even step.
    function axis(side, names, size, room, put) {
      const step = STEPS.find((one) => one * size >= room) || names.length;
      side.replaceChildren();
      names.forEach((name, index) => {
        if (index % step) return;
        const span = element("span", "", side);
        span.textContent = name;
        span.title = name;
        span.dataset.at = index;
        put(span, (index + 0.5) * size);
      });
    }

    function draw() {
      canvas.width = Math.round(columns * wide * dense);
      canvas.height = Math.round(rows * high * dense);
      canvas.style.width = columns * wide + "px";
      canvas.style.height = rows * high + "px";
      const pen = canvas.getContext("2d");
      pen.scale(dense, dense);
      const gap = wide >= 8 && high >= 8 ? 1 : 0;
      const scale = model.scale();
      const digits = wide >= 46 && high >= 18;
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      pen.font = "11px " + getComputedStyle(grid).fontFamily;
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column < columns; column++) {
          const value = model.value(row, column);
          const kind = sign(value, scale);
          if (!kind) continue;
          const x = column * wide;
          const y = row * high;
          const w = wide - gap;
          const h = high - gap;
          if (kind === "number") {
            const rgb = colour(share(value, scale));
            pen.fillStyle = `rgb(${rgb})`;
            pen.fillRect(x, y, w, h);
            if (digits) {
              pen.fillStyle = ink(rgb);
              pen.fillText(short(value), x + w / 2, y + h / 2 + 0.5);
            }
          } else {
            symbol(pen, kind, x, y, w, h);
          }
          if (model.outlined && model.outlined(row, column)) {
            outline(pen, x, y, w, h);
          }
        }
      }
    }

    function symbol(pen, kind, x, y, w, h) {
      pen.save();
      pen.beginPath();
      pen.rect(x, y, w, h);
      pen.clip();
      pen.lineWidth = 1;
      if (kind === "over") {
        pen.fillStyle = "#000";
        pen.fillRect(x, y, w, h);
        pen.strokeStyle = "#fff";
        pen.beginPath();
        const r = Math.max(2, Math.min(w, h) / 3);
        pen.moveTo(x + w / 2 - r, y + h / 2 - r);
        pen.lineTo(x + w / 2 + r, y + h / 2 + r);
        pen.moveTo(x + w / 2 + r, y + h / 2 - r);
        pen.lineTo(x + w / 2 - r, y + h / 2 + r);
        pen.stroke();
      } else {
        const nan = kind === "nan";
        if (nan) {
          pen.fillStyle = "#c8102e";
          pen.fillRect(x, y, w, h);
        }
        pen.strokeStyle = nan ? "#fff" : "#8a8a8a";
        pen.beginPath();
        for (let line = -h; line < w; line += 4) {
          pen.moveTo(x + line, nan ? y + h : y);
          pen.lineTo(x + line + h, nan ? y : y + h);
        }
        pen.stroke();
      }
      pen.restore();
    }

    function outline(pen, x, y, w, h) {
      const thick = Math.min(w, h) >= 12 ? 2 : 1;
      pen.lineWidth = thick;
      pen.strokeStyle = "#e0002d";
      pen.strokeRect(x + thick / 2, y + thick / 2, w - thick, h - thick);
      pen.strokeStyle = "#fff";
      pen.strokeRect(x + thick * 1.5, y + thick * 1.5, Math.max(w - 3 * thick, 0), Math.max(h - 3 * thick, 0));
    }

    function place() {
      cursor.hidden = at === null;
      if (at === null) return;
      readout.classList.add("active");
      cursor.style.left = at.column * wide - 1 + "px";
      cursor.style.top = at.row * high - 1 + "px";
      cursor.style.width = wide + 1 + "px";
      cursor.style.height = high + 1 + "px";
      readout.replaceChildren();
      model.show(at.row, at.column, readout);
    }

    function choose(row, column, aloud) {
      for (const map of maps) if (map.host !== host && map.readout === readout) map.leave();
      at = { row: Math.min(Math.max(row, 0), rows - 1), column: Math.min(Math.max(column, 0), columns - 1) };
      place();
      if (aloud) {
        announce.textContent = model.say(at.row, at.column);
        cursor.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
      }
    }

    function under(event) {
      const frame = canvas.getBoundingClientRect();
      return [Math.floor((event.clientY - frame.top) / high), Math.floor((event.clientX - frame.left) / wide)];
    }

    plane.addEventListener("pointermove", (event) => choose(...under(event), false));
    plane.addEventListener("pointerdown", (event) => choose(...under(event), true));
    plane.addEventListener("focus", () => {
      if (plane.matches(":focus-visible")) choose(at ? at.row : 0, at ? at.column : 0, true);
    });
    plane.addEventListener("keydown", (event) => {
      if (event.altKey || event.metaKey) return;
      const { row, column } = at || { row: 0, column: 0 };
      const far = event.ctrlKey;
      const moves = {
        ArrowLeft: [row, far ? 0 : column - 1],
        ArrowRight: [row, far ? columns - 1 : column + 1],
        ArrowUp: [far ? 0 : row - 1, column],
        ArrowDown: [far ? rows - 1 : row + 1, column],
        Home: [far ? 0 : row, 0],
        End: [far ? rows - 1 : row, columns - 1],
        PageUp: [row - 10, column],
        PageDown: [row + 10, column],
      };
      if (!Object.hasOwn(moves, event.key)) return;
      event.preventDefault();
      choose(...moves[event.key], true);
    });
    const refresh = () => { draw(); place(); };
    const leave = () => { at = null; cursor.hidden = true; };
    maps.push({ host, readout, layOut, refresh, leave });
    return { refresh };
  }

  function line(readout, title, facts, found) {
    element("b", "", readout).textContent = title;
    for (const [name, value, shown] of facts) {
      const part = element("i", shown ? "shown" : "", readout);
      part.append(name + " ");
      element("em", "", part).textContent = value;
    }
    if (found.length) element("b", "found", readout).textContent = found.join("; ");
  }

  const maps = [];

  /* --- layers × heads ----------------------------------------------------------------------------- */

  if (data) {
    const select = byId("metric");
    let metric = data.metrics[0];
    const drawn = [];

    document.querySelectorAll("[data-block]").forEach((host) => {
      const block = data.blocks[Number(host.dataset.block)];
      // A head's number stands at its place in the row's list of heads, since rows may lack some.
      const places = block.rows.map((row) => new Map(row.heads.map((head, index) => [head, index])));
      const value = (row, head, key) => {
        const index = places[row].get(head);
        return index === undefined ? undefined : block.rows[row].values[key][index];
      };
      const named = (row, head) => (block.rows[row].name || block.rows[row].path) + ", head " + head;
      const found = (row, head) => [...(block.rows[row].cells[head] || []), ...block.rows[row].whole];
      drawn.push(heatMap(host, {
        rows: block.rows.map((row) => row.label),
        columns: Array.from({ length: block.heads }, (_, head) => String(head)),
        corner: block.noun ? block.noun + " \\ head" : "head",
        label: "Layers by heads, " + block.title,
        readout: "heads-readout",
        roomy: 72,
        turned: false,
        scale: () => metric,
        value: (row, head) => value(row, head, metric.key),
        outlined: (row, head) => (block.rows[row].cells[head] || []).length > 0,
        flagged: (row) => block.rows[row].whole.length > 0,
        say: (row, head) => {
          if (!places[row].has(head)) return named(row, head) + ": there is no such head";
          const words = found(row, head);
          return `${named(row, head)}: ${metric.name} ${amount(value(row, head, metric.key), metric.unit)}` + (words.length ? "; " + words.join("; ") : "");
        },
        show: (row, head, readout) => {
          const facts = places[row].has(head)
            ? data.metrics.map((one) => [one.name, amount(value(row, head, one.key), one.unit), one === metric])
            : [["", "there is no such head", false]];
          line(readout, named(row, head) + (block.rows[row].path === block.rows[row].label ? "" : " · " + block.rows[row].path), facts, found(row, head));
          element("i", "", readout).textContent = block.rows[row].facts;
        },
      }));
    });

    function choose() {
      metric = data.metrics[select.selectedIndex];
      byId("legend-name").textContent = metric.name + ":";
      byId("legend-low").textContent = `${amount(metric.low, metric.unit)} ${metric.dark}`;
      byId("legend-high").textContent = `${amount(metric.high, metric.unit)} ${metric.bright}`;
      byId("legend-note").textContent = metric.log ? "(logarithmic)" : "";
      const seen = new Set();
      for (const block of data.blocks) {
        for (const row of block.rows) {
          if (Object.keys(row.cells).length) seen.add("finding");
          for (const value of row.values[metric.key]) seen.add(sign(value, metric));
        }
      }
      document.querySelectorAll("[data-sign]").forEach((item) => { item.hidden = !seen.has(item.dataset.sign); });
      drawn.forEach((one) => one.refresh());
    }
    select.addEventListener("change", choose);
    choose();
  }

  /* --- attention maps ----------------------------------------------------------------------------- */

  document.querySelectorAll("[data-map]").forEach((host) => {
    const map = JSON.parse(byId("map-data-" + host.dataset.map).textContent);
    const value = (row, column) => (map.values[row].length ? map.values[row][column] : null);
    const said = (row, column) => (map.values[row].length ? number(value(row, column)) : "no key allowed");
    heatMap(host, {
      rows: map.queries,
      columns: map.keys,
      corner: "query \\ key",
      label: "Attention map, queries by keys, " + map.title,
      readout: "maps-readout",
      roomy: 22,
      turned: true,
      square: true,
      scale: () => ({ low: 0, high: map.high }),
      value,
      say: (row, column) => `query ${map.queries[row]}, key ${map.keys[column]}: ${said(row, column)}`,
      show: (row, column, readout) => {
        line(readout, `query ${map.queries[row]} → key ${map.keys[column]}`, [["probability", said(row, column), true]], []);
      },
    });
  });

  /* --- size and print ----------------------------------------------------------------------------- */

  function layOut() {
    for (const map of maps) map.layOut(map.host.clientWidth, 4000, 5, 1);
  }
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    layOut();
  }).observe(document.body);
  layOut();

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
    for (const map of maps) map.layOut(660, 860, 2, 3); // fits A4 and Letter, in one piece
  });
  window.addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
    layOut();
  });

  /* --- light and dark ----------------------------------------------------------------------------- */

  const theme = byId("theme");
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const tell = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    tell();
  });
  prefersDark.addEventListener("change", tell);
  tell();

  /* --- filter ------------------------------------------------------------------------------------- */

  const filter = byId("filter");
  if (filter) {
    const cards = [...byId("cards").children].map((card) => [card, card.textContent.toLowerCase()]);
    const apply = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const [card, text] of cards) {
        card.hidden = !words.every((word) => text.includes(word));
        shown += card.hidden ? 0 : 1;
      }
      byId("filtered").textContent = words.length ? `${shown} of ${cards.length}` : "";
    };
    filter.addEventListener("input", apply);
  }
})();
