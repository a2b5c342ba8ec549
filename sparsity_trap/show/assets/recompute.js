/* Recomputes rho, mean gain, intervals and verdicts for what a reader chooses, or for a table of
   their own, which never leaves the page. Statistics are those of statistics.js. */
(function () {
  "use strict";

  const S = window.sparsityStatistics;
  const LEAST_GENES = 4;
  const MOST_CELLS = 2e5;  // genes drawn in all, beyond which a page would stand still
  const OWN = "your own table";

  function number(value, digits) {
    if (!Number.isFinite(value)) return "undefined";
    let text = digits ? value.toFixed(digits) : String(Number(value.toPrecision(2)));
    if (Number(text) === 0) text = text.replace("-", "");
    return text.replace("-", "\u2212");
  }

  // --- a reader's own table ------------------------------------------------------------------------

  /* Cells of a line; a cell in quotes may hold the separator. */
  function cells(line, separator) {
    const found = [];
    let cell = "", quoted = false;
    for (const letter of line) {
      if (letter === '"') quoted = !quoted;
      else if (letter === separator && !quoted) { found.push(cell.trim()); cell = ""; }
      else cell += letter;
    }
    return [...found, cell.trim()];
  }

  /* Title of a comparison -> its two columns: score_1 and score_2, or any two with one name and the
     endings _mse and _poisson. */
  function pairs(heading) {
    const found = {};
    if (heading.includes("score_1") && heading.includes("score_2")) {
      found["score_2 \u2212 score_1"] = ["score_1", "score_2"];
    }
    heading.filter((name) => name.endsWith("_mse")).forEach((name) => {
      const other = name.replace(/_mse$/, "_poisson");
      if (heading.includes(other)) found[`${other} \u2212 ${name}`] = [name, other];
    });
    return found;
  }

  /* Read a table of one row per gene, or per gene and run: what `start` shows of a comparison. */
  function parse(text) {
    const lines = text.replace(/^\ufeff/, "").split(/\r?\n/).filter((line) => line.trim());
    const first = lines.length ? lines[0] : "";
    const separator = ["\t", ";", ","].find((s) => first.includes(s)) || ",";
    const heading = cells(first, separator);
    for (const name of ["gene", "sparsity"]) {
      if (!heading.includes(name)) throw new Error(`The first line has no column “${name}”.`);
    }
    const compared = pairs(heading);
    if (!Object.keys(compared).length) {
      throw new Error("The first line has no two scores: name them score_1 and score_2, or end "
        + "their names in _mse and _poisson.");
    }
    const rows = lines.slice(1).map((line) => {
      const row = cells(line, separator);
      return Object.fromEntries(heading.map((name, i) => [name, row[i] ?? ""]));
    });
    const value = (row, name, line) => {
      if (/^(|na|nan|null|undefined)$/i.test(row[name])) return null;
      if (Number.isNaN(Number(row[name]))) {
        throw new Error(`Line ${line + 2}, column “${name}”: “${row[name]}” is not a number.`);
      }
      return Number(row[name]);
    };
    const gene = [...new Set(rows.map((row) => row.gene))];
    const runs = [...new Set(rows.map((row) => row.run || ""))];
    const place = new Map(gene.map((name, i) => [name, i]));
    const facts = { gene, category: gene.map(() => "other"), sparsity: gene.map(() => null) };
    const seen = new Set();
    const scores = {};
    for (const title of Object.keys(compared)) {
      scores[title] = { groups: [S.range(runs.length)], gains: runs.map(() => gene.map(() => null)) };
    }
    rows.forEach((row, line) => {
      const key = JSON.stringify([row.gene, row.run || ""]);
      if (seen.has(key)) {
        throw new Error(`Line ${line + 2}: gene “${row.gene}” stands there twice; for several runs, `
          + "add a column “run”.");
      }
      seen.add(key);
      const at = place.get(row.gene);
      facts.sparsity[at] = value(row, "sparsity", line);
      if (row.category) facts.category[at] = row.category;
      for (const [title, names] of Object.entries(compared)) {
        const [one, two] = names.map((name) => value(row, name, line));
        const known = one !== null && two !== null;
        scores[title].gains[runs.indexOf(row.run || "")][at] = known ? two - one : null;
      }
    });
    return { facts, scores };
  }

  // --- what is shown -------------------------------------------------------------------------------

  /* Rho and mean gain over the genes whose category is chosen and that have a score in every run. */
  function compute(facts, score, categories, worth, worthRho) {
    const genes = S.range(facts.gene.length).filter((g) => categories.includes(facts.category[g])
      && facts.sparsity[g] !== null && score.gains.every((run) => run[g] !== null));
    if (genes.length < LEAST_GENES) {
      throw new Error(`Fewer than ${LEAST_GENES} genes are left: choose more.`);
    }
    const gains = score.gains.map((run) => genes.map((g) => run[g]));
    const patches = score.patches && {
      df: score.patches.df,
      covariance: genes.map((g) => genes.map((h) => score.patches.covariance[g][h] ?? 0)),
    };
    const next = S.generator(1);
    const count = Math.max(200, Math.min(2000, Math.round(MOST_CELLS / genes.length)));
    const pick = (n) => Math.floor(next() * n);
    const x = genes.map((g) => facts.sparsity[g]);
    const rho = S.rhoDraws(x, gains, score.groups, count, pick);
    const gain = S.meanGain(gains, score.groups, patches);
    const rows = [[rho, worthRho], [gain, worth]].map(([evidence, below]) => {
      const tested = S.test(evidence, below);
      return { ...evidence, p: tested.p, verdict: S.decide(tested) };
    });
    return {
      rho: rows[0], gain: rows[1], genes: genes.length, runs: gains.length, count,
      patients: score.groups.length, ofRuns: gain.ofRuns, patches: Boolean(patches),
      rhoP: S.rhoP(rho.value, genes.length),
    };
  }

  /* What the intervals hold, in words. */
  function basis(found) {
    const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
    const of = `${found.genes} genes, ${many(found.runs, "run")} of each`
      + (found.patients > 1 ? ` on ${found.patients} patients.` : ".");
    const alone = ` If genes were independent, \u03c1 would have p = ${number(found.rhoP)} `
      + "(Student\u2019s t, n \u2212 2 degrees of freedom, two-sided).";
    if (found.ofRuns) {
      return `${of} With so few runs, intervals and verdicts are over genes`
        + `${found.patches ? " and patches" : ""} alone: they speak of these runs, not of what a `
        + `loss would do in others.${alone}`;
    }
    return `${of} Intervals hold what other runs and other genes${found.patches
      ? " (and, of the mean gain, other patches)" : ""} like these would change. \u03c1: `
      + `${found.count} draws of runs and genes.${alone}`;
  }

  function start(root) {
    const data = JSON.parse(root.querySelector(".rc-data").textContent);
    const one = (name) => root.querySelector(".rc-" + name);
    const comparisons = Object.fromEntries(Object.entries(data.comparisons)
      .map(([name, scores]) => [name, { facts: data.facts, scores }]));
    let current;

    function list(select, names) {
      select.replaceChildren(...names.map((name) => new Option(name)));
    }

    function compare() {
      current = comparisons[one("comparison").value];
      list(one("score"), Object.keys(current.scores));
      const names = [...new Set(current.facts.category)];
      one("categories").replaceChildren(...names.map((name) => {
        const label = document.createElement("label");
        const box = document.createElement("input");
        Object.assign(box, { type: "checkbox", checked: true, value: name });
        label.append(box, " " + name);
        return label;
      }));
      show();
    }

    function show() {
      const chosen = [...root.querySelectorAll(".rc-categories input:checked")].map((b) => b.value);
      const bounds = [one("worth"), one("worth-rho")].map((input) => Number(input.value));
      let found = null;
      try {
        if (!bounds.every((bound) => bound >= 0)) throw new Error("A bound has to be 0 or more.");
        found = compute(current.facts, current.scores[one("score").value], chosen, ...bounds);
        one("said").textContent = basis(found);
      } catch (error) {
        one("said").textContent = error.message;
      }
      ["rho", "gain"].forEach((name) => {
        const row = found && found[name];
        const texts = row ? [
          number(row.value, 3), row.interval.map((end) => number(end, 3)).join(" to "),
          number(row.p), row.verdict + (found.ofRuns ? ", in these runs" : ""),
        ] : ["\u2013", "\u2013", "\u2013", "\u2013"];
        one(name).querySelectorAll("td").forEach((cell, i) => { cell.textContent = texts[i]; });
      });
    }

    function take(file) {
      file.text().then((text) => {
        comparisons[OWN] = parse(text);
        list(one("comparison"), Object.keys(comparisons));
        one("comparison").value = OWN;
        compare();
      }).catch((error) => { one("said").textContent = `${file.name}: ${error.message}`; });
    }

    one("comparison").addEventListener("change", compare);
    ["score", "categories", "worth", "worth-rho"].forEach((name) => {
      one(name).addEventListener("change", show);
    });
    one("file").addEventListener("change", (event) => {
      if (event.target.files.length) take(event.target.files[0]);
    });
    root.addEventListener("dragover", (event) => event.preventDefault());
    root.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    });
    list(one("comparison"), Object.keys(comparisons));
    one("scripted").hidden = false;
    compare();
  }

  window.sparsityRecompute = { parse, compute };
  document.querySelectorAll(".rc-genes:not([data-ready])").forEach((root) => {
    root.dataset.ready = "";
    start(root);
  });
})();
