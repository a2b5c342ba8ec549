/* Decides the claims of a ledger again, at the bound that a reader sets: every bound above 0 moves in
   proportion, and the tests are corrected for their number as in the ledger. */
(function () {
  "use strict";

  const S = window.sparsityStatistics;

  function number(value, digits) {
    let text = digits ? value.toFixed(digits) : String(Number(value.toPrecision(2)));
    if (Number(text) === 0) text = text.replace("-", "");
    return text.replace("-", "\u2212");
  }

  function evidence(given) {
    if (given.least) return S.least(given.least.map(evidence));
    if (given.draws) return S.draws(given.value, given.draws);
    return S.effect(given.value, [[given.se ** 2, given.df]]);
  }

  /* p after Holm, and verdict, of every claim. */
  function settle(claims, factor) {
    const tests = claims.map((claim) =>
      S.test(evidence(claim.evidence), claim.below * factor, claim.above));
    const ps = S.holm(tests.map((test) => test.p));
    return tests.map(({ ruling }, i) => ({ p: ps[i], verdict: S.decide({ ruling, p: ps[i] }) }));
  }

  function start(root) {
    const data = JSON.parse(root.querySelector(".rc-data").textContent);
    const bound = root.querySelector(".rc-bound");
    const before = settle(data.claims, 1).map((row) => row.verdict);

    function show() {
      const said = root.querySelector(".rc-said");
      const worth = Number(bound.value);
      if (!(bound.value && worth >= 0)) {
        said.textContent = "The bound has to be 0 or more.";
        return;
      }
      const found = settle(data.claims, worth / data.worth);
      root.querySelectorAll("tbody tr").forEach((row, i) => {
        const texts = [
          number(evidence(data.claims[i].evidence).value, 3),
          number(data.claims[i].below * worth / data.worth, 3), number(found[i].p),
          found[i].verdict,
        ];
        row.querySelectorAll("td").forEach((cell, k) => { cell.textContent = texts[k]; });
        row.classList.toggle("rc-changed", found[i].verdict !== before[i]);
      });
      const count = (name) => found.filter((row) => row.verdict === name).length;
      const changed = found.filter((row, i) => row.verdict !== before[i]).length;
      said.textContent = `Of ${found.length} claims that are tested, ${count("supported")} are `
        + `supported, ${count("not supported")} are not, ${count("undetermined")} are undetermined; `
        + `${changed} differ from the ledger.`;
    }

    bound.addEventListener("change", show);
    root.querySelector(".rc-scripted").hidden = false;
    show();
  }

  window.sparsityBounds = { settle };
  document.querySelectorAll(".rc-ledger:not([data-ready])").forEach((root) => {
    root.dataset.ready = "";
    start(root);
  });
})();
