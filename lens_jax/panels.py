"""The panels of a run's summary page, one function each: `panel(ax, run)` draws records, no more.

A panel whose records are absent says so on its axes. A matrix has one colour on the whole page.
"""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import NullLocator

from lens_jax import axis_style as axes
from lens_jax.axis_style import BLUE, FAINT, GRID, INK, LINES, SHADE, SKY, VERMILLION
from lens_jax.fits import PowerLaw, fit_power_law, rankme, rankme_sigma, topk_share, window_alpha
from lens_jax.jackknife import alpha_error, jackknife
from lens_jax.saved_run import SavedRun, display_windows, layer_name, short_count, site_name

MAX_CURVES = 24
WEIGHT_RANGE = 300  # the last values of a square random matrix reach down to any depth
RAISED = 2.0  # fitted lines beside a spectrum instead of on it

ACTIVATION, LAST_TOKEN = "act_cov_eigenvalues", "act_last_cov_eigenvalues"
GRADIENT, CENTRED = "grad_singular_values", "grad_singular_values_centred"
WEIGHT = "weight_singular_values"


def loss(ax, run: SavedRun) -> None:
    """Train loss (raw and smoothed) and validation loss against tokens, with known yardsticks."""
    ax.set_title("(a) Loss")
    train, val = _finite(run.train), _finite(run.val)
    if not train["loss"].size + val["loss"].size:
        return axes.not_measured(ax)
    if train["loss"].size:
        thin = slice(None, None, max(1, train["loss"].size // 2000))
        ax.plot(train["tokens"][thin], train["loss"][thin], color=SKY, lw=0.7, alpha=0.6)
        smooth = axes.running_mean(train["loss"])
        ax.plot(train["tokens"], smooth, color=BLUE, lw=1.6, label="train, smoothed")
    if val["loss"].size:
        marker = axes.marker("o", val["loss"].size)
        label = f"validation, last {val['loss'][-1]:.3f}"
        ax.plot(val["tokens"], val["loss"], color=VERMILLION, marker=marker, label=label)
    # The curve is high on the left and low on the right: each label stands where it is not.
    axes.level(ax, run.target_loss, "target", 0.01, "left")
    axes.level(ax, run.fact("unigram_entropy"), "unigram entropy", 0.99, "right")
    ax.set_ylabel("loss (nats per token)")
    axes.token_axis(ax, run.token_counts())
    axes.legend_above_data(ax, 2)


def activation_spectra(ax, run: SavedRun) -> None:
    """Trace-normalised eigenvalues of the final layer over training, with the last fits."""
    site = run.final_site(ACTIVATION)
    records = run.records(ACTIVATION, site)
    ax.set_title(f"(b) Activation spectrum, {_layer(site)}")
    if not any(map(axes.can_show, records)):
        return axes.not_measured(ax, axes.reason(records))
    tokens = [record.tokens for record in records]
    norm = axes.token_norm(tokens)
    colours = ScalarMappable(norm, "viridis_r")
    for index in axes.spaced(len(records), MAX_CURVES):
        record = records[index]
        rank, shares = axes.visible(record.values, record.values.sum())
        if record.tokens > 0:
            ax.plot(rank, shares, color=colours.to_rgba(record.tokens), lw=1.2)
        else:
            ax.plot(rank, shares, color=FAINT, ls=":", label="step 0")
    _draw_fits(ax, run, site)
    axes.rank_axes(ax, f"eigenvalue / trace, {site_name(site)}")
    if any(tokens):
        bar = ax.figure.colorbar(colours, ax=ax, pad=0.015, aspect=28)
        axes.token_ticks(bar.ax.yaxis, norm.vmin, norm.vmax)
        bar.ax.set_title("tokens", fontsize=8, weight="normal")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower left")


def tail_exponents(ax, run: SavedRun) -> None:
    """Alpha of three rank windows of the final layer over training, with standard errors."""
    site = run.final_site(ACTIVATION)
    records = run.records(ACTIVATION, site)
    ax.set_title(rf"(c) Exponent $\alpha$ of activations, {_layer(site)}")
    windows = _tail_windows(run, records[-1].values.size) if records else []
    if not windows or not any(map(axes.can_show, records)):
        return axes.not_measured(ax, axes.reason(records))
    tokens = [record.tokens for record in records]
    for name, window, colour, shape in windows:
        fits = [
            fit_power_law(r.values, *window).on_whole(window[1], r.values.size) for r in records
        ]
        alphas = [fit.alpha for fit in fits]
        label = _window_label(name, window)
        line = {"color": colour, "marker": axes.marker(shape, len(records)), "label": label}
        if has_jackknife(run, site):
            ax.plot(tokens, alphas, **line)
            errors = _errors(run, site, lambda left_out, w=window: alpha_error(left_out, *w))
            axes.band(ax, tokens, alphas, errors, colour)
        else:
            ax.errorbar(tokens, alphas, [fit.se for fit in fits], elinewidth=1, **line)
    bars = "band: jackknife s.e." if has_jackknife(run, site) else "bars: s.e. of the OLS slope"
    ax.set_ylabel(rf"$\alpha$ of eigenvalues  ({bars})")
    axes.token_axis(ax, run.measured_tokens())
    axes.legend_above_data(ax, 3)


def rankme_trajectories(ax, run: SavedRun) -> None:
    """The three RankMe variants of the final layer's activations over training."""
    site = run.final_site(ACTIVATION) or run.final_site(LAST_TOKEN)
    ax.set_title(f"(d) RankMe of activations, {_layer(site)}")
    variants = (
        (r"RankMe$_\sigma$ (square roots of eigenvalues)", ACTIVATION, rankme_sigma),
        (r"RankMe$_\lambda$ (eigenvalues)", ACTIVATION, rankme),
        (r"RankMe$_\lambda$, last token of each window", LAST_TOKEN, rankme),
    )
    measured = [*run.records(ACTIVATION, site), *run.records(LAST_TOKEN, site)]
    if not any(map(axes.can_show, measured)):
        return axes.not_measured(ax, axes.reason(measured))
    for (label, kind, statistic), (colour, marker) in zip(variants, LINES, strict=False):
        records = run.records(kind, site)
        if records:
            width = records[-1].values.size
            values = [statistic(record.values) for record in records]
            tokens = [record.tokens for record in records]
            marker = axes.marker(marker, len(records))
            ax.plot(tokens, values, color=colour, marker=marker, label=label)
        if records and kind == ACTIVATION and has_jackknife(run, site):
            errors = _errors(run, site, lambda left_out, s=statistic: jackknife(s, left_out))
            axes.band(ax, tokens, values, errors, colour)
    bars = "band: jackknife s.e." if has_jackknife(run, site) else "no error bars"
    ax.set_ylabel(f"directions, of {width}  ({bars})")
    axes.token_axis(ax, run.measured_tokens())
    axes.legend_above_data(ax, 3)


def gradient_spectra(ax, run: SavedRun) -> None:
    """Per-sample gradient singular values of the last probed layer at the last measured step."""
    sites = run.last_layer_sites(GRADIENT)
    drawn = []
    for name, site in sites.items():
        record = run.records(GRADIENT, site)[-1]
        largest = record.values.max(initial=0.0)
        if not largest > 0:
            continue
        drawn.append(name)
        colour, _ = _matrix_line(run, name)
        centred = run.records(CENTRED, site)
        if centred and centred[-1].step == record.step:
            nonzero = centred[-1].values[:-1]  # N rows minus their mean have rank N - 1
            ax.plot(*axes.visible(nonzero, largest), color=colour, lw=1.6)
        ax.plot(*axes.visible(record.values, largest), color=colour, lw=1.1, ls="--")
    ax.set_title(f"(e) Gradient spectrum, {_layer(*sites.values())}")
    if not drawn:
        return axes.not_measured(ax, axes.reason(_last_records(run, GRADIENT, sites)))
    axes.rank_axes(ax, r"$\sigma$ / largest uncentred $\sigma$")
    handles = [*_matrix_handles(run, drawn), *_centring_handles(run)]
    ax.legend(
        handles=handles, title=_when(run, GRADIENT, sites), loc="lower left", alignment="left"
    )


def gradient_concentration(ax, run: SavedRun) -> None:
    """Share of the ten largest gradient singular values over training, by matrix."""
    sites = run.last_layer_sites(GRADIENT)
    ax.set_title(f"(f) Gradient concentration, {_layer(*sites.values())}")
    drawn = []
    count = max((run.records(GRADIENT, site)[-1].values.size for site in sites.values()), default=0)
    k = 10 if count > 20 else 1
    for name, site in sites.items():
        colour, marker = _matrix_line(run, name)
        marker = axes.marker(marker, len(run.records(GRADIENT, site)))
        for kind, line in ((GRADIENT, "--"), (CENTRED, "-")):
            records = run.records(kind, site)
            shares = np.array([topk_share(record.values, k) for record in records])
            if np.any(np.isfinite(shares)):
                drawn.append(name)
                tokens = [record.tokens for record in records]
                ax.plot(tokens, shares, color=colour, ls=line, marker=marker)
    if not drawn:
        return axes.not_measured(ax, axes.reason(_last_records(run, GRADIENT, sites)))
    ax.set_ylabel(f"top-{k} share of {count} singular values")
    axes.token_axis(ax, run.measured_tokens())
    handles = [*_matrix_handles(run, dict.fromkeys(drawn), markers=True), *_centring_handles(run)]
    axes.legend_above_data(ax, (len(handles) + 1) // 2, handles=handles, ncol=2)


def layer_heat_map(ax, run: SavedRun) -> None:
    """Alpha of the main rank window for every measured layer and step."""
    ax.set_title(r"(g) Exponent $\alpha$ of activations by layer")
    site = run.final_site(ACTIVATION)
    if site is None:
        return axes.not_measured(ax)
    records = run.records(ACTIVATION, site)
    windows = _windows(run, records[-1].values.size)
    if not windows:
        return axes.not_measured(ax, axes.reason(records))
    name, window = windows[0]
    label = rf"$\alpha$, {_window_label(name, window)}"
    _draw_heat_map(ax, run, lambda values: window_alpha(values, *window), label)


def rankme_heat_map(ax, run: SavedRun) -> None:
    """RankMe of the eigenvalues for every measured layer and step."""
    ax.set_title(r"(i) RankMe$_\lambda$ of activations by layer")
    site = run.final_site(ACTIVATION)
    if site is None:
        return axes.not_measured(ax)
    width = run.records(ACTIVATION, site)[-1].values.size
    _draw_heat_map(ax, run, rankme, rf"RankMe$_\lambda$ (directions, of {width})")


def weight_spectra(ax, run: SavedRun) -> None:
    """Singular values of the last probed layer's weights at the last measured step."""
    sites = run.last_layer_sites(WEIGHT)
    drawn, has_first = [], False
    for name, site in sites.items():
        records = run.records(WEIGHT, site)
        colour, _ = _matrix_line(run, name)
        first, last = records[0].values, records[-1].values
        if len(records) > 1 and first.max(initial=0.0) > 0:
            has_first = True
            ax.plot(*axes.visible(first, 1.0), color=colour, ls=":", lw=1.1)
        if last.max(initial=0.0) > 0:
            drawn.append(name)
            ax.plot(*axes.visible(last, 1.0), color=colour)
    ax.set_title(f"(h) Weight spectrum, {_layer(*sites.values())}")
    if not drawn:
        return axes.not_measured(ax, axes.reason(_last_records(run, WEIGHT, sites)))
    axes.rank_axes(ax, r"singular value $\sigma$")
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, high / WEIGHT_RANGE), high)
    extra = [axes.line_handle(INK, ":", label="first measurement")] if has_first else []
    handles = [*_matrix_handles(run, drawn), *extra]
    ax.legend(handles=handles, title=_when(run, WEIGHT, sites), loc="lower left", alignment="left")


PANELS = (
    loss,
    activation_spectra,
    tail_exponents,
    rankme_trajectories,
    gradient_spectra,
    gradient_concentration,
    layer_heat_map,
    weight_spectra,
)


def has_jackknife(run: SavedRun, site: str | None) -> bool:
    """Tells whether a site's activations were measured in groups, so that errors are known."""
    return bool(run.left_out(ACTIVATION, site))


def _last_records(run: SavedRun, kind: str, sites: dict[str, str]) -> list:
    return [run.records(kind, site)[-1] for site in sites.values()]


def _finite(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = np.isfinite(rows["loss"])
    return {name: values[kept] for name, values in rows.items()}


def _windows(run: SavedRun, width: int) -> list[tuple[str, tuple[int, int]]]:
    return list(display_windows(run.fact("tier"), width).items())


def _window_label(name: str, window: tuple[int, int]) -> str:
    ranks = f"{window[0]}-{window[1]}"
    return f"ranks {ranks}" if ranks == name else f"ranks {ranks} ({name} scaled)"


def _tail_windows(run: SavedRun, width: int) -> list[tuple[str, tuple[int, int], str, str]]:
    """Returns (published name, window, colour, marker) of three windows, low ranks first."""
    windows = sorted(_windows(run, width)[-3:], key=lambda item: item[1])
    return [(*window, *line) for window, line in zip(windows, LINES, strict=False)]


def _errors(run: SavedRun, site: str, error) -> list[float]:
    """Returns a jackknife standard error a record; NaN at steps without left-out spectra."""
    left_out = run.left_out(ACTIVATION, site)
    steps = [record.step for record in run.records(ACTIVATION, site)]
    return [error(left_out[step]) if step in left_out else np.nan for step in steps]


def _draw_fits(ax, run: SavedRun, site: str) -> None:
    """Draws the last power laws: the main window's on its shade, the tails' above the spectrum."""
    record = run.records(ACTIVATION, site)[-1]
    halo = [Stroke(linewidth=4.5, foreground="white"), Normal()]
    label = "last fits of (c), raised"
    for _, window, colour, _ in _tail_windows(run, record.values.size):
        rank, line = _fit_line(record.values, fit_power_law(record.values, *window))
        ax.plot(rank, RAISED * line, color=colour, lw=2, path_effects=halo, label=label)
        label = None
    windows = _windows(run, record.values.size)
    if not windows:
        return
    fit = fit_power_law(record.values, *windows[0][1])
    ax.axvspan(fit.first, fit.last, color=SHADE, zorder=0, lw=0)
    if not np.isfinite(fit.alpha):
        return
    left_out = run.left_out(ACTIVATION, site).get(record.step)
    error = fit.se if left_out is None else alpha_error(left_out, fit.first, fit.last)
    ranks, bars = f"ranks {fit.first}-{fit.last}", " (OLS)" if left_out is None else ""
    label = rf"last $\alpha$ = {fit.alpha:.2f} $\pm$ {error:.2f}{bars}, {ranks}"
    ax.plot(*_fit_line(record.values, fit), color=INK, label=label, lw=2.2, ls=(0, (2, 1.2)))


def _fit_line(values: np.ndarray, fit: PowerLaw) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ranks of a fit and its line in shares of the trace; nothing without a fit."""
    if not np.isfinite(fit.alpha):
        return np.array([]), np.array([])
    rank = np.arange(fit.first, fit.last + 1)
    usable = values[rank - 1] > 0
    height = np.log(values[rank - 1][usable] / values.sum()).mean()
    return rank, np.exp(height - fit.alpha * (np.log(rank) - np.log(rank[usable]).mean()))


def _draw_heat_map(ax, run: SavedRun, statistic, label: str) -> None:
    """Draws a statistic of the activations, a row a layer and a column a step."""
    sites = run.layers(ACTIVATION)
    tokens = {r.step: r.tokens for site in sites for r in run.records(ACTIVATION, site)}
    steps = sorted(tokens)
    numbers = np.full((len(sites), len(steps)), np.nan)
    for row, site in enumerate(sites):
        for record in run.records(ACTIVATION, site):
            numbers[row, steps.index(record.step)] = statistic(record.values)
    ax.set_facecolor(GRID)  # shows where there is none
    ax.grid(False)
    # Edges of the cells' own colours, or a vector picture has hairlines between them.
    cells = {"cmap": "cividis", "edgecolors": "face", "linewidth": 0.3}
    mesh = ax.pcolormesh(np.ma.masked_invalid(numbers), **cells)
    columns, rows = axes.strided(len(steps), 5), axes.strided(len(sites), 12)
    ax.set_xticks(columns + 0.5, [short_count(tokens[steps[i]]) for i in columns])
    ax.set_yticks(rows + 0.5, [layer_name(sites[i]) for i in rows])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("training tokens (a column per measurement)")
    ax.figure.colorbar(mesh, ax=ax, pad=0.015, aspect=28).set_label(label)


def _matrix_line(run: SavedRun, name: str) -> tuple[str, str]:
    """Returns a matrix's colour and marker, the same in every panel."""
    names = sorted({site_name(s) for kind in (GRADIENT, WEIGHT) for s in run.sites(kind)})
    return LINES[names.index(name) % len(LINES)]


def _matrix_handles(run: SavedRun, names, *, markers: bool = False) -> list:
    lines = {name: _matrix_line(run, name) for name in names}
    return [
        axes.line_handle(colour, marker=marker if markers else "", label=name)
        for name, (colour, marker) in lines.items()
    ]


def _centring_handles(run: SavedRun) -> list:
    centred = [axes.line_handle(INK, "-", label="mean gradient removed")]
    uncentred = [axes.line_handle(INK, "--", label="uncentred")]
    return (centred if run.sites(CENTRED) else []) + uncentred


def _layer(*sites: str | None) -> str:
    return layer_name(sites[0]) if sites and sites[0] else "last layer"


def _when(run: SavedRun, kind: str, sites: dict[str, str]) -> str:
    last = max(run.records(kind, site)[-1].tokens for site in sites.values())
    return f"at {short_count(last)} tokens"
