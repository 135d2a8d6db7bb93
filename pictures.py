"""Pictures for people: boxes on photos, from noise to detections, pages of photos, and a run's curves.

Nothing here knows a model: eval.py says what to draw. `draw` (one photo), `strip` and `film` (DiffuDETR's way from noise
to detections), `sheet` (many photos), `plot_curves` (a log), `compare_runs` (many logs).
"""
import colorsys
import contextlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


def colour_of(i):
    """(r, g, b) of the i-th label or query: the golden angle keeps the hues of any few neighbours far apart."""
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(0.58 + 0.618034 * i, 0.82, 0.95))


def draw(photo, boxes, labels, classes, scores=None):
    """A copy of a photo with boxes, names and scores on it; a small one is enlarged, so that the names can be read.

    photo: PIL. boxes: K x (x0, y0, x1, y1) in its pixels. labels: K ints. classes: names. scores: K, or None.
    """
    zoom = max(1, round(480 / max(photo.size)))
    picture = ImageOps.scale(photo.convert("RGB"), zoom)
    width, height = picture.size
    pen, line = ImageDraw.Draw(picture), max(3, round(max(width, height) / 250))
    font = ImageFont.load_default(size=max(13, max(width, height) / 45))
    boxes = [[min(max(x * zoom, 0), side - 1) for x, side in zip(box, (width, height) * 2)] for box in boxes]
    colours = [colour_of(label) for label in labels]
    for (x0, y0, x1, y1), colour in reversed(list(zip(boxes, colours))):             # the best on top
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=line + 2)       # seen on any background
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
    texts = [classes[c] + ("" if scores is None else f" {scores[i]:.2f}") for i, c in enumerate(labels)]
    tags = []                                            # names after all boxes, or a box would cross them out
    for (x0, y0, x1, y1), colour, text in zip(boxes, colours, texts):
        w, h = pen.textlength(text, font) + 6, font.size * 1.3
        x = min(x0, max(width - w, 0))
        places = [y for y in (y0 - h, y0, y1, y1 - h, *np.arange(y0 + h, y1 - h, h)) if 0 <= y <= height - h] or [0]
        free = [y for y in places if all(abs(y - b) >= h or x + w <= a or a + c <= x for a, b, c in tags)]
        y = (free or places)[0]                          # above the box, else wherever no other name stands
        tags.append((x, y, w))
        pen.rectangle((x, y, x + w, y + h), fill=colour)
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140                         # to the eye (BT.601)
        pen.text((x + 3, y + h / 2), text, font=font, fill="black" if bright else "white", anchor="lm")
    return picture


def strip(photo, steps, detections):
    """DiffuDETR at work on one photo: its boxes at every evaluation, from noise to detections, side by side.

    photo: PIL. steps: a list of dicts, one per evaluation: t; references [Q', 4], what the decoder was given, and boxes
    [Q', 4], what it made of them (cxcywh in [0, 1]); rows [Q'], which query each is; keep [Q'] bool, False: it starts
    again from fresh noise (in the last step: it is no detection). detections: the photo with the final ones drawn on it.
    """
    photo = fitted(photo, 360)
    panels = [(f"noise, t = {steps[0]['t']}", boxes_of_queries(photo, steps[0], 0))]
    for number, step in enumerate(steps, 1):
        kept = f"{int(step['keep'].sum())} of {len(step['keep'])} " + ("kept" if number < len(steps) else "found")
        panels.append((f"evaluation {number}: {kept}", boxes_of_queries(photo, step, 1)))
    panels.append(("detections", detections.resize(photo.size, Image.Resampling.LANCZOS)))
    return sheet([picture for _, picture in panels], [title for title, _ in panels])


def film(photo, steps, detections, path, moves=8):
    """The same as an animation (WebP): each evaluation moves its boxes from the references to the decoder's answer, then
    the kept ones go on to the next time, while the rest make room for fresh noise."""
    photo, frames, held = fitted(photo, 480), [], []                                     # held: milliseconds of each frame
    for number, step in enumerate(steps):
        for part in np.linspace(0, 1, moves):
            eased = (1 - np.cos(np.pi * part)) / 2                                           # slow at both ends
            frames.append(boxes_of_queries(photo, step, eased, f"t = {step['t']}"))
            held.append(70)
        held[-moves], held[-1] = 600, 900 if number + 1 == len(steps) else 600
    frames.append(detections.resize(photo.size, Image.Resampling.LANCZOS))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=held + [2500], loop=0, quality=70)


def fitted(photo, longest):
    """A copy of a photo, its long side `longest` pixels."""
    return ImageOps.contain(photo.convert("RGB"), (longest, longest), Image.Resampling.LANCZOS)


def boxes_of_queries(photo, step, part, text=None):
    """The photo with an evaluation's boxes, `part` of the way from its references to its answers: every query in its own
    colour, thick if it is kept, thin and pale if it starts again."""
    overlay = Image.new("RGBA", photo.size)
    pen, limit = ImageDraw.Draw(overlay), np.array(photo.size * 2) - 1
    boxes = (1 - part) * np.asarray(step["references"]) + part * np.asarray(step["boxes"])
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1).clip(0, 1) * limit
    for kept in (False, True):                                                                    # the kept ones on top
        for box, query, keep in zip(corners.tolist(), step["rows"].tolist(), step["keep"].tolist()):
            if keep == kept:
                pen.rectangle(box, outline=(*colour_of(query), 255 if kept else 150), width=3 if kept else 1)
    if text:
        font = ImageFont.load_default(size=22)
        pen.rectangle((0, 0, pen.textlength(text, font) + 12, 32), fill="white")
        pen.text((6, 16), text, font=font, fill="black", anchor="lm")
    return Image.alpha_composite(photo.convert("RGBA"), overlay).convert("RGB")


def sheet(drawn, titles):
    """Pictures (PIL) in rows under one title per column -> one white page."""
    gap, head, columns = 12, 44, len(titles)                                                             # pixels
    rows, width = [drawn[i:i + columns] for i in range(0, len(drawn), columns)], gap + max(p.width for p in drawn)
    heights = [gap + max(picture.height for picture in row) for row in rows]
    page = Image.new("RGB", (len(rows[0]) * width + gap, head + sum(heights)), "white")
    pen, font, top = ImageDraw.Draw(page), ImageFont.load_default(size=22), head
    for row, height in zip(rows, heights):
        for middle, picture, title in zip(range((gap + width) // 2, page.width, width), row, titles):
            page.paste(picture, (middle - picture.width // 2, top + (height - gap - picture.height) // 2))
            pen.text((middle, head / 2), title, font=font, fill="black", anchor="mm")
        top += height
    return page


def read_log(path):
    """A run's log.jsonl -> a function (key, least) -> [2,N]: the steps and values of a key, of values from `least` on."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):                    # a run that was killed leaves half a line
            lines.append(json.loads(text))
    return lambda key, least=1e-12: np.array(
        [(line["step"], line[key]) for line in lines if line.get(key, -1) >= least]).reshape(-1, 2).T


def smoothed(values):
    """The mean over a thirtieth of the run around each value; the window holds fewer at the ends."""
    window = np.ones(max(1, len(values) // 30))
    total, held = (np.convolve(x, window, "same") for x in (values, np.ones(len(values))))
    return total / held


def plot_curves(log_path, out_path):
    """Draw a run's log.jsonl: losses (log axis, smoothed over the raw line) and COCO AP over steps -> an image file."""
    from matplotlib.figure import Figure            # not pyplot: no display, no global state; here: slow to import
    series = read_log(log_path)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, name, colour in (("loss", "total", "black"), ("loss_class", "class", "tab:blue"),
                              ("loss_bbox", "L1", "tab:orange"), ("loss_giou", "GIoU", "tab:green")):
        for key, name, style in ((key, name, "-"), (f"{key}_dn", f"{name}, denoising", "--")):
            steps, values = series(key)
            if len(steps):
                left.plot(steps, values, color=colour, alpha=0.15, linewidth=0.8)
                left.plot(steps, smoothed(values), style, color=colour, label=name)
    for key, colour in (("AP", "tab:red"), ("AP50", "tab:purple")):
        steps, values = series(key, 0)                   # pycocotools' -1 is no measurement
        if len(steps):
            right.plot(steps, values, ".-", color=colour, label=f"{key} (last: {values[-1]:.3f})")
    left.set(yscale="log", title="training loss", xlabel="step")
    right.set(ylim=(0, None), title="COCO metrics on the validation photos", xlabel="step")
    finish(figure, (left, right), out_path)


def finish(figure, axes, out_path):
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend()
    figure.savefig(out_path, dpi=130)


def passes(steps, values, floor):
    """The first step from which a smoothed curve is below `floor`, or None."""
    below = np.flatnonzero(smoothed(values) < floor)
    return int(steps[below[0]]) if len(below) else None


def compare_runs(folders, out_path):
    """Draw runs' class losses (log axis) and AP together; returns a line for every pair of runs: whether the class loss
    of one passes the other's floor (the lowest that its smoothed curve comes), when, and where theirs are
    different losses (ce, focal, ...), which cannot be compared, that."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    curves, found, kinds = {}, [], []
    names = [Path(folder).resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]
    for n, (folder, name) in enumerate(zip(folders, names)):
        if not (Path(folder) / "log.jsonl").exists():
            raise FileNotFoundError(f"--compare {folder}: no log.jsonl there. Name a run's folder, such as out/diffu-toy")
        series, colour = read_log(Path(folder) / "log.jsonl"), f"C{n}"
        chosen = Path(folder) / "run.json"
        kinds.append(json.loads(chosen.read_text())["config"]["class_loss"] if chosen.exists() else None)
        steps, values = curves[n] = series("loss_class")
        axes[0].plot(steps, values, color=colour, alpha=0.15, linewidth=0.8)
        axes[0].plot(steps, smoothed(values), color=colour, label=name)
        axes[1].plot(*series("AP", 0), ".-", color=colour, label=name)
    for a, (steps, values) in curves.items():
        for b, (_, others) in curves.items():
            if a == b or not len(values) or not len(others):
                continue
            floor = smoothed(others).min()
            step = passes(steps, values, floor)
            differ = None not in (kinds[a], kinds[b]) and kinds[a] != kinds[b]
            found.append(f"{names[a]} {'never passes' if step is None else 'passes'} the class loss floor of {names[b]} "
                         f"({floor:.4g})" + ("" if step is None else f" at step {step}")
                         + (f"; they are not the same loss: {kinds[a]}, {kinds[b]}" if differ else ""))
            if step is not None:
                axes[0].plot([step], [floor], "o", color=f"C{a}", markersize=7)
                axes[0].axhline(floor, color=f"C{b}", linewidth=0.8, linestyle=":")
    axes[0].set(yscale="log", title="class loss (dots: where a run passes another's floor)", xlabel="step")
    axes[1].set(ylim=(0, None), title="AP on the validation photos", xlabel="step")
    finish(figure, axes, out_path)
    return found
