"""A hook of MkDocs: files of the project's root that the site shows where they lie, so that a link such as
../benchmarks/README.md is right in a checkout, on the web page of the repository and on the site."""

from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/*.png",
    "benchmarks/*.gif",
    "model_cards/space.png",
)
CARDS = ("model_cards/*/README.md", *(f"model_cards/*/samples*.{ending}" for ending in ("png", "gif", "wav")))


def on_files(files, config):
    for pattern in (*SHOWN, *CARDS):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """The pages of docs/ are the site's root."""
    if page.file.src_dir == config.docs_dir:
        return markdown.replace("](../", "](")
    return markdown.replace("](../docs/", "](../").replace("](docs/", "](")
