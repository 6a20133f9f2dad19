"""Objects of COCO 2017 (Lin et al. 2014, arXiv 1405.0312) as tracks of one frame.

```
<root>/annotations/instances_train2017.json
<root>/train2017/000000000009.jpg ...          or <root>/images/train2017/...
```
Groups of objects (`iscrowd`) are left out. Tracks of one photograph have its name, so that a
sampler can choose photographs first.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks.tracking.sequences.clean import clean
from tasks.tracking.sequences.json_stream import elements
from tasks.tracking.sequences.sequence import Track
from visionlora.errors import DataError

LAYOUT = "ROOT/annotations/instances_train2017.json and ROOT/train2017/ (or ROOT/images/train2017/)"
SPLIT = "train2017"


def read_training(root: Path) -> Iterator[Track]:
    """Yield a track for every object whose box has an area inside its image.

    Raises:
        DataError: the annotation or the images are missing, or an object's image is not listed.
    """
    file = root / "annotations" / f"instances_{SPLIT}.json"
    folder = next((f for f in (root / SPLIT, root / "images" / SPLIT) if f.is_dir()), None)
    if folder is None:
        raise DataError(f"COCO: no images in {root}; expected {LAYOUT}")
    boxes: dict[int, list[list[float]]] = {}
    images: dict[int, tuple[str, int, int]] = {}
    try:
        for key, entry in elements(file, ("images", "annotations")):
            if key == "images":
                images[entry["id"]] = (entry["file_name"], entry["width"], entry["height"])
            elif not entry.get("iscrowd", 0):
                boxes.setdefault(entry["image_id"], []).append(entry["bbox"])
        for image, objects in boxes.items():
            name, width, height = images[image]
            frames = (folder / name,)
            for box in objects:
                row = np.array([box], dtype=np.float64).reshape(1, 4)
                track = clean(frames[0].stem, frames, row, None, (width, height), "coco")
                if track is not None:
                    yield track
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not COCO's annotation of objects: {error!r}") from error
