/* What the page recomputes, as pure functions on plain arrays: ranks and Spearman's rho, Student's t,
   the variance of a gain between runs, genes and patches, a bootstrap of both, and the verdict.
   They mirror scipy.stats, analysis/effects.py and analysis/claims.py, and are tested against them. */
window.sparsityStatistics = (function () {
  "use strict";

  const LEAST_PAIRS = 3;  // fewer runs estimate no variance between runs
  const LEVEL = 0.025;    // one side of 5 %

  const sum = (x) => x.reduce((a, b) => a + b, 0);
  const mean = (x) => sum(x) / x.length;
  const squares = (x) => { const m = mean(x); return sum(x.map((v) => (v - m) ** 2)); };
  const variance = (x) => squares(x) / (x.length - 1);
  const range = (n) => Array.from({ length: n }, (_, i) => i);

  /* Ranks from 1, ties at their average. */
  function ranks(x) {
    const order = range(x.length).sort((i, j) => x[i] - x[j]);
    const found = new Array(x.length);
    for (let from = 0; from < order.length;) {
      let to = from;
      while (to < order.length && x[order[to]] === x[order[from]]) to += 1;
      for (let k = from; k < to; k += 1) found[order[k]] = (from + to + 1) / 2;
      from = to;
    }
    return found;
  }

  /* Spearman's rho, the correlation of ranks; NaN where a side is constant. */
  function rho(x, y) {
    const [a, b] = [ranks(x), ranks(y)];
    const [ma, mb] = [mean(a), mean(b)];
    const spread = squares(a) * squares(b);
    return spread > 0 ? sum(a.map((v, i) => (v - ma) * (b[i] - mb))) / Math.sqrt(spread) : NaN;
  }

  /* Logarithm of the gamma function (Lanczos 1964, g = 7, nine terms). */
  const LANCZOS = [
    0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313,
    -176.61502916214059, 12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6,
    1.5056327351493116e-7,
  ];
  function logGamma(x) {
    if (x < 0.5) return Math.log(Math.PI / Math.abs(Math.sin(Math.PI * x))) - logGamma(1 - x);
    const t = x + 6.5;
    const series = sum(LANCZOS.map((c, i) => (i ? c / (x - 1 + i) : c)));
    return 0.5 * Math.log(2 * Math.PI) + (x - 0.5) * Math.log(t) - t + Math.log(series);
  }

  /* Regularised incomplete beta function, by its continued fraction (DLMF 8.17.22). */
  function beta(x, a, b) {
    if (x <= 0 || x >= 1) return x <= 0 ? 0 : 1;
    if (x > (a + 1) / (a + b + 2)) return 1 - beta(1 - x, b, a);
    const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b)
      + a * Math.log(x) + b * Math.log1p(-x)) / a;
    const off0 = (v) => (Math.abs(v) < 1e-300 ? 1e-300 : v);
    let c = 1, d = 1 / off0(1 - (a + b) * x / (a + 1)), fraction = d;
    for (let m = 1; m < 500; m += 1) {
      const before = fraction;
      for (const term of [
        m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
        -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
      ]) {
        d = 1 / off0(1 + term * d);
        c = off0(1 + term / c);
        fraction *= c * d;
      }
      if (Math.abs(fraction - before) < 1e-15 * Math.abs(fraction)) break;
    }
    return front * fraction;
  }

  /* Student's t: share below a value, and the value below which a share lies. */
  function tBelow(t, df) {
    if (Number.isNaN(t) || !(df > 0)) return NaN;
    const tail = beta(df / (df + t * t), df / 2, 0.5) / 2;
    return t > 0 ? 1 - tail : tail;
  }
  function tQuantile(share, df) {
    if (!(df > 0)) return NaN;
    let [low, high] = [-1, 1];
    while (tBelow(low, df) > share) low *= 2;
    while (tBelow(high, df) < share) high *= 2;
    for (let i = 0; i < 100; i += 1) {
      const middle = (low + high) / 2;
      if (tBelow(middle, df) < share) low = middle; else high = middle;
    }
    return (low + high) / 2;
  }

  /* Two-sided p of rho by Student's t with n - 2 degrees of freedom, as scipy.stats.spearmanr. */
  function rhoP(value, n) {
    if (Math.abs(value) >= 1) return 0;
    return 2 * tBelow(-Math.abs(value) * Math.sqrt((n - 2) / (1 - value * value)), n - 2);
  }

  /* Share q of sorted values, linear between them, as numpy.quantile. */
  function quantile(sorted, q) {
    const at = q * (sorted.length - 1);
    const below = Math.floor(at);
    const above = Math.min(below + 1, sorted.length - 1);
    return sorted[below] + (at - below) * (sorted[above] - sorted[below]);
  }

  /* An estimate whose variance is a sum of independent ones, [variance, degrees of freedom] each
     (effects.combined). */
  function effect(value, parts) {
    const used = parts.filter(([v, df]) => df > 0 || Number.isNaN(v));
    const total = sum(used.map(([v]) => v));
    const df = total ** 2 / sum(used.filter((p) => p[1] > 0).map(([v, d]) => v ** 2 / d));
    const se = Math.sqrt(total);
    const half = tQuantile(0.975, df) * se;
    return {
      value, se, df, interval: [value - half, value + half],
      pAbove: (bound) => tBelow(-(value - bound) / se, df),
      pBelow: (bound) => tBelow((value - bound) / se, df),
    };
  }

  /* An estimate with draws of a bootstrap (effects.Draws). */
  function draws(value, found) {
    const sorted = [...found].sort((a, b) => a - b);
    const share = (chosen) => (1 + sorted.filter(chosen).length) / (1 + sorted.length);
    return {
      value, interval: [quantile(sorted, 0.025), quantile(sorted, 0.975)],
      pAbove: (bound) => share((v) => v <= bound),
      pBelow: (bound) => share((v) => v >= bound),
    };
  }

  /* The smallest of several effects (claims.Least). */
  function least(effects) {
    const smallest = effects.reduce((a, b) => (b.value < a.value ? b : a));
    return {
      value: smallest.value, interval: smallest.interval,
      pAbove: (bound) => Math.max(...effects.map((e) => e.pAbove(bound))),
      pBelow: (bound) =>
        Math.min(1, effects.length * Math.min(...effects.map((e) => e.pBelow(bound)))),
    };
  }

  /* Variance that runs bring to a mean over patients, and its degrees of freedom
     (effects.between_runs); `groups` has the places of each patient's runs. */
  function betweenRuns(perRun, groups) {
    const df = perRun.length - groups.length;
    if (df < LEAST_PAIRS - 1) return [NaN, 0];
    const within = sum(groups.map((group) => squares(group.map((i) => perRun[i]))));
    return [within / df * sum(groups.map((g) => 1 / g.length)) / groups.length ** 2, df];
  }

  /* Mean gain with its interval (effects.contrast): `gains` has a row per run and a column per gene;
     `patches`, if any, the covariance of genes that patches bring, and its degrees of freedom.
     Runs too few to show their variance are left out of it: `ofRuns` says so. */
  function meanGain(gains, groups, patches) {
    const genes = range(gains[0].length);
    const ofGene = genes.map((g) =>
      mean(groups.map((group) => mean(group.map((i) => gains[i][g])))));
    const parts = [betweenRuns(gains.map(mean), groups)];
    const ofRuns = Number.isNaN(parts[0][0]);
    if (ofRuns) parts.pop();
    parts.push([variance(ofGene) / genes.length, genes.length - 1]);
    if (patches) parts.push([sum(patches.covariance.map(sum)) / genes.length ** 2, patches.df]);
    return { ...effect(mean(ofGene), parts), ofRuns };
  }

  /* Numbers in [0, 1) from a seed, the same in every browser (Vigna's SplitMix in 32 bits). */
  function generator(seed) {
    let state = seed;
    return () => {
      state = (state + 0x9e3779b9) | 0;
      let z = state ^ (state >>> 16);
      z = Math.imul(z, 0x21f0aaad);
      z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
      return ((z ^ (z >>> 15)) >>> 0) / 4294967296;
    };
  }

  /* Spearman's rho of x with the mean gain, runs and genes drawn anew (effects.crossed_draws);
     genes alone where the runs are too few. `pick(n)` gives a place below n. */
  function rhoDraws(x, gains, groups, count, pick) {
    const genes = range(x.length), runs = range(gains.length);
    const ofGene = (rows) => genes.map((g) => mean(rows.map((i) => gains[i][g])));
    const whole = ofGene(runs);
    const df = runs.length - groups.length;
    const ofRuns = df < LEAST_PAIRS - 1;
    const normal = 1.959963984540054;
    const stretch = Math.sqrt(1 + groups.length / df) * tQuantile(0.975, df) / normal;
    const found = range(count).map(() => {
      let gain = whole;
      if (!ofRuns) {
        const drawn = ofGene(groups.flatMap((group) => group.map(() => group[pick(group.length)])));
        gain = genes.map((g) => whole[g] + stretch * (drawn[g] - whole[g]));
      }
      const chosen = genes.map(() => pick(genes.length));
      return rho(chosen.map((g) => x[g]), chosen.map((g) => gain[g]));
    });
    return { ...draws(rho(x, whole), found), ofRuns };
  }

  /* The verdict that lies nearer, and the p of its test (claims.Ledger); `below` is the least that
     is worth the name. */
  function test(evidence, below, above = 0) {
    if (!evidence.interval.every(Number.isFinite)) return { ruling: "undetermined", p: NaN };
    const up = evidence.value >= Math.max(above, below);
    return {
      ruling: up ? "supported" : "not supported",
      p: up ? evidence.pAbove(above) : evidence.pBelow(below),
    };
  }
  const decide = ({ ruling, p }) => (p <= LEVEL ? ruling : "undetermined");

  /* Holm's correction (1979) of several p. */
  function holm(ps) {
    const order = range(ps.length).sort((i, j) => ps[i] - ps[j]);
    const found = new Array(ps.length);
    let largest = 0;
    order.forEach((i, k) => {
      largest = Math.max(largest, Math.min(1, (ps.length - k) * ps[i]));
      found[i] = largest;
    });
    return found;
  }

  return {
    ranks, rho, rhoP, tBelow, tQuantile, quantile, effect, draws, least, meanGain, generator,
    rhoDraws, test, decide, holm, range,
  };
})();
