"""Pictures of points: scatter plots of pairs of their numbers, such as a Ramachandran plot or a map."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .writing import whole_file


# height of a panel, and what is left around it for numbers and names
HEIGHT, LEFT, BELOW, ABOVE, RIGHT = 220, 34, 28, 18, 10
SAMPLES, DATA = (200, 60, 30), (40, 90, 170)
# more points are a patch of colour
MOST_POINTS = 20_000
# more plots in a row than this can't be read
MOST_PLOTS = 12


def pairs_of(count):
    """The pairs of columns that are shown of points of so many: 0 with 1, 2 with 3, and a last one with that before; of
    one column (0, None)."""
    if count == 1:
        return [(0, None)]
    starts = [*range(0, count - 1, 2), *([count - 2] if count % 2 else [])]
    return [(start, start + 1) for start in starts]


def limits_of(values, limits):
    """Limits of each column, those that are None as far as values (N, columns) go."""
    finite = values[np.isfinite(values).all(1)]
    found = []
    for i, each in enumerate(limits):
        if each is None:
            low, high = np.quantile(finite[:, i], [0.001, 0.999]) if len(finite) else (0.0, 1.0)
            margin = 0.05 * (high - low) or 1.0
            each = low - margin, high + margin
        found.append(each)
    return found


def panel(values, pair, limits, names, title, colour, aspect=1.0):
    """A scatter plot of values (N, columns): the first of a pair of columns to the right and the second up, or of one
    column a histogram; `aspect` is width over height."""
    width, font = round(HEIGHT * aspect), ImageFont.load_default(11)
    picture = Image.new("RGB", (LEFT + width + RIGHT, ABOVE + HEIGHT + BELOW), "white")
    draw, (right, up) = ImageDraw.Draw(picture), pair
    low, high = limits[right]
    values = values[np.isfinite(values).all(1)][:MOST_POINTS]
    across = LEFT + (values[:, right] - low) / (high - low) * width
    if up is None:
        counts, edges = np.histogram(values[:, right], bins=60, range=(low, high))
        ends = np.linspace(LEFT, LEFT + width, len(edges))
        top = HEIGHT * 0.95 / max(1, counts.max())
        for left, end, count in zip(ends, ends[1:], counts, strict=False):
            draw.rectangle([left, ABOVE + HEIGHT - top * count, end - 1, ABOVE + HEIGHT], fill=colour)
    else:
        bottom, upper = limits[up]
        inside = ((values[:, right] >= low) & (values[:, right] <= high)) & (
            (values[:, up] >= bottom) & (values[:, up] <= upper)
        )
        down = ABOVE + HEIGHT - (values[:, up] - bottom) / (upper - bottom) * HEIGHT
        radius = 0.5 if len(values) > 3000 else 1.0
        for x, y in zip(across[inside], down[inside], strict=True):
            draw.rectangle([x - radius, y - radius, x + radius, y + radius], fill=colour)
        for value, y in ((bottom, ABOVE + HEIGHT - 12), (upper, ABOVE)):
            draw.text((2, y), f"{value:.4g}", fill="black", font=font)
        name = Image.new("RGB", (HEIGHT, 14), "white")
        middle = (HEIGHT - font.getlength(str(names[up]))) / 2
        ImageDraw.Draw(name).text((middle, 0), str(names[up]), fill="black", font=font)
        picture.paste(name.transpose(Image.Transpose.ROTATE_90).crop((0, 16, 14, HEIGHT - 16)), (14, ABOVE + 16))
    draw.rectangle([LEFT, ABOVE, LEFT + width, ABOVE + HEIGHT], outline="grey")
    beneath = ABOVE + HEIGHT + 4
    draw.text((LEFT, beneath), f"{low:.4g}", fill="black", font=font)
    end = f"{high:.4g}"
    draw.text((LEFT + width - font.getlength(end), beneath), end, fill="black", font=font)
    draw.text(
        (LEFT + width / 2 - font.getlength(str(names[right])) / 2, beneath), str(names[right]), fill="black", font=font
    )
    draw.text((LEFT, 3), title, fill="black", font=font)
    return picture


def save_scatter(rows, path, pairs, limits, names, aspect=1.0):
    """Write scatter plots as a PNG.

    Args:
        rows: [[(title, values (N, columns), colour), ...], ...], a row of panels each; every pair has these rows.
        pairs: as `pairs_of` makes them. limits: (low, high) of each column, None for what the values say.
        names: of the columns.
    """
    limits = limits_of(np.concatenate([values for row in rows for _, values, _ in row]), limits)
    pictures = [
        [panel(values, pair, limits, names, title, colour, aspect) for title, values, colour in row]
        for pair in pairs
        for row in rows
    ]
    width, height = pictures[0][0].size
    grid = Image.new("RGB", (max(map(len, pictures)) * width, len(pictures) * height), "white")
    for down, row in enumerate(pictures):
        for right, picture in enumerate(row):
            grid.paste(picture, (right * width, down * height))
    with whole_file(path) as temporary:
        grid.save(temporary, format="PNG")
