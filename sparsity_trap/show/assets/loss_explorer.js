/* Loss explorer: three losses and their gradients at a rate and a count that the reader sets. */
(function () {
  "use strict";

  const THETA = 1;            // dispersion of the negative binomial: variance λ + λ²/θ
  const LOW = -2.3, HIGH = 1.3;  // log10 of the rates drawn, 0.005 to 20
  const BOX = { width: 360, height: 250, left: 44, right: 8, top: 26, bottom: 40 };

  /* Loss above its minimum over the rate, which every one of them has at rate = count, and its
     derivative with respect to the rate. */
  const log = (y, ratio) => (y > 0 ? y * Math.log(ratio) : 0);
  const LOSSES = {
    mse: {
      excess: (rate, y) => (y - rate) * (y - rate),
      slope: (rate, y) => 2 * (rate - y),
    },
    poisson: {
      excess: (rate, y) => rate - y + log(y, y / rate),
      slope: (rate, y) => 1 - y / rate,
    },
    nb: {
      excess: (rate, y) =>
        log(y, y / rate) - (y + THETA) * Math.log((y + THETA) / (rate + THETA)),
      slope: (rate, y) => (rate - y) / rate * THETA / (THETA + rate),
    },
  };
  /* dλ/dη of each link, written with the rate itself. */
  const LINKS = { exp: (rate) => rate, softplus: (rate) => -Math.expm1(-rate) };

  function text(value) {
    const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 3;
    return value.toFixed(digits).replace(/^-(0(\.0+)?)$/, "$1").replace("-", "\u2212");
  }

  function element(parent, name, attributes, content) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.keys(attributes).forEach((key) => made.setAttribute(key, attributes[key]));
    if (content !== undefined) made.textContent = content;
    parent.appendChild(made);
    return made;
  }

  /* Round numbers between two ends, about four of them. */
  function ticks(low, high) {
    const rough = (high - low) / 4;
    const power = Math.pow(10, Math.floor(Math.log10(rough)));
    const step = power * [1, 2, 5, 10].find((n) => n * power >= rough);
    const found = [];
    for (let n = Math.ceil(low / step); n * step <= high; n += 1) found.push(n * step);
    return found;
  }

  function start(root) {
    const rateInput = root.querySelector(".le-rate");
    const countInput = root.querySelector(".le-count-input");
    const plots = Array.from(root.querySelectorAll(".le-plots svg"));

    function draw() {
      const rate = Math.pow(10, Number(rateInput.value));
      const y = Number(countInput.value);
      const shownRate = Number(rate.toPrecision(2));
      root.querySelector(".le-rate-value").textContent = String(shownRate);
      root.querySelector(".le-count-value").textContent = String(y);
      rateInput.setAttribute("aria-valuetext", "rate " + shownRate);

      const curves = Object.keys(LOSSES).map((name) => ({
        name: name, className: "", value: (r) => LOSSES[name].excess(r, y),
      }));
      const gradients = [];
      Object.keys(LOSSES).forEach((name) => Object.keys(LINKS).forEach((link) => gradients.push({
        name: name, className: "le-" + link, value: (r) => LOSSES[name].slope(r, y) * LINKS[link](r),
      })));
      // The Poisson loss at the lowest rate is the largest value worth seeing; MSE may leave.
      const top = Math.max(2, 1.05 * LOSSES.poisson.excess(Math.pow(10, LOW), y));
      plot(plots[0], curves, [0, top], rate, y);
      const reach = Math.max(1, 1.6 * y);
      plot(plots[1], gradients, [-reach, reach], rate, y);

      Object.keys(LOSSES).forEach((name) => {
        const cells = root.querySelectorAll("tr[data-loss=" + name + "] td");
        const slope = LOSSES[name].slope(rate, y);
        cells[0].textContent = text(LOSSES[name].excess(rate, y));
        cells[1].textContent = text(slope * LINKS.exp(rate));
        cells[2].textContent = text(slope * LINKS.softplus(rate));
      });
    }

    function plot(svg, curves, range, rate, y) {
      const across = (logRate) =>
        BOX.left + (logRate - LOW) / (HIGH - LOW) * (BOX.width - BOX.left - BOX.right);
      const up = (value) => BOX.height - BOX.bottom
        - (value - range[0]) / (range[1] - range[0]) * (BOX.height - BOX.top - BOX.bottom);
      const bottom = BOX.height - BOX.bottom;
      Array.from(svg.children).forEach((child) => {
        if (!child.matches("title, .le-title")) child.remove();
      });

      ticks(range[0], range[1]).forEach((value) => {
        element(svg, "line", { x1: BOX.left, x2: BOX.width - BOX.right, y1: up(value), y2: up(value) });
        const label = { x: BOX.left - 6, y: up(value) + 4, "text-anchor": "end" };
        element(svg, "text", label, String(Number(value.toPrecision(6))).replace("-", "\u2212"));
      });
      [0.01, 0.1, 1, 10].forEach((value) => {
        const x = across(Math.log10(value));
        element(svg, "line", { x1: x, x2: x, y1: bottom, y2: bottom + 4 });
        element(svg, "text", { x: x, y: bottom + 17, "text-anchor": "middle" }, String(value));
      });
      const middle = (BOX.left + BOX.width - BOX.right) / 2;
      element(svg, "text", { x: middle, y: BOX.height - 6, "text-anchor": "middle" },
        "rate λ (expected UMI per bin)");

      if (y > 0) {  // the common minimum
        const x = across(Math.log10(y));
        element(svg, "line", { class: "le-count", x1: x, x2: x, y1: BOX.top, y2: bottom });
        element(svg, "text", { x: x, y: BOX.top - 3, "text-anchor": "middle" }, "λ = y");
      }
      const here = across(Math.log10(rate));
      element(svg, "line", { class: "le-here", x1: here, x2: here, y1: BOX.top, y2: bottom });
      curves.forEach((curve) => {
        let path = "";
        let pen = "M";
        for (let i = 0; i <= 180; i += 1) {
          const logRate = LOW + (HIGH - LOW) * i / 180;
          const value = curve.value(Math.pow(10, logRate));
          // A curve ends where it leaves the plot, one point beyond the edge cut to the edge.
          const inside = value >= range[0] && value <= range[1];
          if (!inside && pen === "M") continue;
          path += pen + across(logRate).toFixed(1) + " "
            + up(Math.min(Math.max(value, range[0]), range[1])).toFixed(1);
          pen = inside ? "L" : "M";
        }
        const style = "stroke: var(--le-" + curve.name + ")";
        element(svg, "path", { d: path, style: style, class: curve.className });
        const value = curve.value(rate);
        if (value >= range[0] && value <= range[1]) {
          const fill = "fill: var(--le-" + curve.name + ")";
          element(svg, "circle", { cx: here, cy: up(value), r: 4, style: fill });
        }
      });
    }

    rateInput.addEventListener("input", draw);
    countInput.addEventListener("input", draw);
    root.querySelector(".le-scripted").hidden = false;
    draw();
  }

  document.querySelectorAll(".loss-explorer:not([data-ready])").forEach((root) => {
    root.dataset.ready = "";
    start(root);
  });
})();
