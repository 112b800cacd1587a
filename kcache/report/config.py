"""What a report is told to show."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What `kcache report` is told."""

    path: str
    """A run directory or a cache."""
    output: str | None = None
    """The HTML file; None takes report.html in a run directory, and NAME-report.html beside a cache called NAME."""
    neighbours: bool = False
    """Of a run: compare the newest pictures with the whole cache, by CLIP's image encoder."""
    pretrained_decoder_model_name_or_path: str | None = None
    """Of a cache: folder or Hub id with movq, to decode some latents; None decodes none."""
    source: str | None = None
    """Of a cache: where it was built from, to show originals; None shows none."""
    image_column: str = "image"
    """Column of the source that holds the image."""
    device: str = "cpu"
    """Where CLIP and MoVQ run."""
