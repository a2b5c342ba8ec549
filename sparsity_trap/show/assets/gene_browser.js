/* Gene browser: pictures of one gene side by side, moved together, and a swipe of two of them.
   The page holds the first gene's pictures; this script loads the others when they are asked for. */
(function () {
  "use strict";

  function start(root) {
    const data = JSON.parse(root.querySelector(".gb-data").textContent);
    const one = (selector) => root.querySelector(selector);
    const all = (selector) => Array.from(root.querySelectorAll(selector));
    const picker = one(".gb-gene");
    const panels = one(".gb-panels");
    const swipe = one(".gb-swipe");
    const split = one(".gb-split");
    let shown = 0;   // index of the gene on view
    let wanted = 0;  // index of the gene asked for; differs while its pictures load
    let zoom = 1, left = 0, top = 0;  // window into the section, as fractions of it

    // --- genes ---

    function address(gene, panel) {
      return panel.file
        ? data.folder + "/" + panel.file
        : data.folder + "/" + gene.file + "-" + panel.key + ".webp";
    }

    function panelOf(key) {
      return data.panels.find((panel) => panel.key === key);
    }

    function fill(image, gene) {
      const panel = panelOf(image.dataset.panel);
      image.src = address(gene, panel);
      image.alt = panel.file ? panel.label : gene.name + ", " + panel.alt;
      image.classList.toggle("gb-smooth", Boolean(panel.file));
    }

    /* All pictures of a gene appear at once, or one might be compared with another gene's. */
    function request(index) {
      wanted = (index + data.genes.length) % data.genes.length;
      picker.value = data.genes[wanted].name;
      const mine = wanted;
      Promise.all(data.panels.map((panel) => new Promise((resolve, reject) => {
        const image = new Image();
        image.onload = resolve;
        image.onerror = () => reject(panel.label);
        image.src = address(data.genes[mine], panel);
      }))).then(
        () => { if (mine === wanted) show(mine); },
        (label) => { one(".gb-status").textContent = "The picture “" + label + "” is missing."; }
      );
    }

    function show(index) {
      const gene = data.genes[index];
      shown = index;
      one(".gb-status").textContent = "";
      all(".gb-view img").forEach((image) => fill(image, gene));
      one(".gb-name").textContent = gene.name;
      lines(one(".gb-facts"), gene.facts);
      one(".gb-facts").style.borderColor = gene.colour;
      all(".gb-scores").forEach((place) => lines(place, gene.scores[place.dataset.panel] || []));
      one(".gb-ticks").replaceChildren(...gene.ticks.map(([text, position]) => {
        const tick = document.createElement("span");
        tick.textContent = text;
        tick.style.left = position + "%";
        return tick;
      }));
      remember();
    }

    function lines(place, texts) {
      place.replaceChildren(...texts.map((text) => {
        const line = document.createElement("span");
        line.textContent = text;
        return line;
      }));
    }

    // --- address: #gene=PIGR, and &view=swipe ---

    function remember() {
      let hash = "#gene=" + encodeURIComponent(data.genes[shown].name);
      if (!swipe.hidden) hash += "&view=swipe";
      if (location.hash === hash || (!location.hash && shown === 0 && swipe.hidden)) return;
      history.replaceState(history.state, "", hash);
    }

    function follow() {
      const asked = new URLSearchParams(location.hash.slice(1));
      const index = data.genes.findIndex((gene) => gene.name === asked.get("gene"));
      if (index < 0) return;
      setSwipe(asked.get("view") === "swipe");
      request(index);
      root.scrollIntoView();
    }

    // --- pan and zoom ---

    /* Width of the views in pixels; all that are on show have the same. */
    function viewWidth() {
      const view = all(".gb-view").find((candidate) => candidate.offsetWidth > 0);
      return view ? view.offsetWidth : 300;  // none has a size while the browser is hidden
    }

    function within(newZoom) {
      const limit = Math.max(4, 32 * data.columns / viewWidth());  // a bin is 32 pixels wide
      return Math.min(Math.max(newZoom, 1), limit);
    }

    function move(newZoom, newLeft, newTop) {
      const rest = (value) => Math.min(Math.max(value, 0), 1 - 1 / zoom);
      zoom = within(newZoom);
      left = rest(newLeft);
      top = rest(newTop);
      root.style.setProperty("--gb-z", zoom);
      root.style.setProperty("--gb-x", -100 * left * zoom + "%");
      root.style.setProperty("--gb-y", -100 * top * zoom + "%");
      root.classList.toggle("gb-zoomed", zoom > 1.001);
      scale(viewWidth());
    }

    /* Zoom and keep the point at (x, y), fractions of the view, where it is. */
    function zoomAt(factor, x, y) {
      const next = within(zoom * factor);
      move(next, left + x / zoom - x / next, top + y / zoom - y / next);
    }

    function scale(width) {
      const perPixel = data.columns * data.bin_um / (width * zoom);
      const longest = 0.36 * width * perPixel;
      const power = Math.pow(10, Math.floor(Math.log10(longest)));
      const length = power * [5, 2, 1].find((step) => step * power <= longest);
      all(".gb-scale").forEach((bar) => {
        bar.textContent = length >= 1000 ? length / 1000 + " mm" : length + " µm";
        bar.style.width = length / perPixel + "px";
      });
    }

    /* Position of a pointer in the view under it, as fractions. */
    function place(event) {
      const view = event.target.closest(".gb-view");
      const box = view.getBoundingClientRect();
      return {
        x: (event.clientX - box.left) / box.width,
        y: (event.clientY - box.top) / box.height,
        view: view,
      };
    }

    const pointers = new Map();
    let armed = false;     // the pointer itself moved here: the page did not scroll under it
    let lastScreen = "";

    function down(event) {
      if (event.target.closest(".gb-divider") || event.button > 0) return;
      pointers.set(event.pointerId, place(event));
      event.target.closest(".gb-view").setPointerCapture(event.pointerId);
      if (event.pointerType === "mouse") event.preventDefault();  // no dragging of the picture
      (swipe.hidden ? panels : swipe.querySelector(".gb-view")).focus({ preventScroll: true });
    }

    function drag(event) {
      const screen = event.screenX + "," + event.screenY;
      if (screen !== lastScreen) armed = true;
      lastScreen = screen;
      const now = place(event);
      if (event.pointerType === "mouse") {
        root.style.setProperty("--gb-cx", 100 * now.x + "%");
        root.style.setProperty("--gb-cy", 100 * now.y + "%");
        all(".gb-cursor").forEach((ring) => { ring.hidden = ring.parentNode === now.view; });
      }
      const before = pointers.get(event.pointerId);
      if (!before) return;
      if (pointers.size === 1) {
        move(zoom, left - (now.x - before.x) / zoom, top - (now.y - before.y) / zoom);
      } else {
        const other = Array.from(pointers).find(([id]) => id !== event.pointerId)[1];
        const spread = (p) => Math.hypot(p.x - other.x, p.y - other.y);
        zoomAt(spread(now) / Math.max(spread(before), 0.01),
               (now.x + other.x) / 2, (now.y + other.y) / 2);
      }
      pointers.set(event.pointerId, now);
    }

    function up(event) {
      pointers.delete(event.pointerId);
      if (event.type === "pointerleave") {
        armed = false;
        all(".gb-cursor").forEach((ring) => { ring.hidden = true; });
      }
    }

    function wheel(event) {
      // Scrolling past the browser must not end in it, nor zooming out of the whole section.
      if (!armed || (zoom <= 1.001 && event.deltaY > 0)) return;
      event.preventDefault();
      const at = place(event);
      const lines = event.deltaMode === 1 ? 30 : 1;
      zoomAt(Math.exp(-Math.max(-120, Math.min(120, event.deltaY * lines)) / 300), at.x, at.y);
    }

    function key(event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const step = 0.15 / zoom;
      const actions = {
        ArrowLeft: () => move(zoom, left - step, top),
        ArrowRight: () => move(zoom, left + step, top),
        ArrowUp: () => move(zoom, left, top - step),
        ArrowDown: () => move(zoom, left, top + step),
        "+": () => zoomAt(1.5, 0.5, 0.5),
        "=": () => zoomAt(1.5, 0.5, 0.5),
        "-": () => zoomAt(1 / 1.5, 0.5, 0.5),
        0: () => move(1, 0, 0),
        n: () => request(wanted + 1),
        p: () => request(wanted - 1),
      };
      const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!action) return;
      event.preventDefault();
      event.stopPropagation();  // the arrow keys would turn the book's page
      action();
    }

    // --- swipe ---

    function setSwipe(on) {
      swipe.hidden = !on;
      all(".gb-panels figure").forEach((figure) => { figure.hidden = on; });
      one(".gb-about").classList.toggle("gb-wide", on || data.about_wide);
      one(".gb-mode").setAttribute("aria-pressed", String(on));
      move(zoom, left, top);
    }

    function setSide(select, image, tag) {
      image.dataset.panel = select.value;
      tag.textContent = panelOf(select.value).label;
      fill(image, data.genes[shown]);
    }

    function setSplit() {
      root.style.setProperty("--gb-split", split.value + "%");
    }

    // --- wiring ---

    picker.addEventListener("change", () => {
      request(data.genes.findIndex((gene) => gene.name === picker.value));
    });
    one(".gb-previous").addEventListener("click", () => request(wanted - 1));
    one(".gb-next").addEventListener("click", () => request(wanted + 1));
    one(".gb-in").addEventListener("click", () => zoomAt(1.5, 0.5, 0.5));
    one(".gb-out").addEventListener("click", () => zoomAt(1 / 1.5, 0.5, 0.5));
    one(".gb-whole").addEventListener("click", () => move(1, 0, 0));
    one(".gb-mode").addEventListener("click", () => {
      setSwipe(swipe.hidden);
      remember();
    });
    all(".gb-side").forEach((select) => {
      const image = one(".gb-swipe img[data-side='" + select.dataset.side + "']");
      const tag = one(".gb-tag[data-side='" + select.dataset.side + "']");
      select.addEventListener("change", () => setSide(select, image, tag));
      setSide(select, image, tag);
    });
    split.addEventListener("input", setSplit);
    split.value = 50;  // some browsers restore the last value on reload
    const divider = one(".gb-divider");
    divider.addEventListener("pointerdown", (event) => {
      divider.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    divider.addEventListener("pointermove", (event) => {
      if (!divider.hasPointerCapture(event.pointerId)) return;
      split.value = 100 * place(event).x;
      setSplit();
    });
    all(".gb-view").forEach((view) => {
      view.addEventListener("pointerdown", down);
      view.addEventListener("pointermove", drag);
      ["pointerup", "pointercancel", "pointerleave"].forEach((name) => {
        view.addEventListener(name, up);
      });
      view.addEventListener("wheel", wheel, { passive: false });
    });
    panels.addEventListener("keydown", key);
    swipe.querySelector(".gb-view").addEventListener("keydown", key);
    window.addEventListener("scroll", () => { armed = false; }, { passive: true });
    window.addEventListener("resize", () => move(zoom, left, top));
    window.addEventListener("hashchange", follow);
    panels.tabIndex = 0;
    all(".gb-scripted").forEach((part) => { part.hidden = false; });
    move(1, 0, 0);
    follow();
  }

  document.querySelectorAll(".gene-browser:not([data-ready])").forEach((root) => {
    root.dataset.ready = "";
    start(root);
  });
})();
