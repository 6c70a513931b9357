"""ImageNet and Places2 as they come: where their archives put the images, which class the images of
a flat val/ have, and what the synsets of ImageNet are called."""
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from lib.errors import UserError

# {synset: the name of its class}, in the order of the synsets
SYNSETS = dict(line.split(" ", 1) for line in
               Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines())
# Where training images and where validation images may lie, the first that there is.
TRAIN_FOLDERS = {
    "imagenet": ["train", "ILSVRC/Data/CLS-LOC/train"],
    "places2": ["train", "places365_standard/train", "data_256", "data_256_standard",
                "train_256_places365standard/data_256", "train_256_places365standard",
                "data_large", "data_large_standard"],
}
VAL_FOLDERS = {
    "imagenet": ["val", "ILSVRC/Data/CLS-LOC/val"],
    "places2": ["val", "places365_standard/val", "val_256/val_256", "val_256", "val_large"],
}
CLASSES = {"imagenet": "1,000 WNIDs, such as n01440764", "places2": "365 classes"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
UNPACKED_AS = {"ILSVRC2012_img_train.tar": "train", "ILSVRC2012_img_val.tar": "val"}
KAGGLE_LABELS = "LOC_val_solution.csv"
PLACES_LABELS = "places365_val.txt"
PLACES_CLASSES = "categories_places365.txt"


# ---- where the images are

def find_folders(name: str, data_dir: str) -> list[str]:
    """Returns the folders of training and validation images of imagenet or places2.

    They are looked for in the folder `name` of data_dir, and in data_dir itself. Raises UserError
    if they are not there, or not unpacked yet."""
    refuse_archive(data_dir, "--data-dir")
    roots = [Path(data_dir, name), Path(data_dir)]
    for root in roots:
        train = first_folder(root, TRAIN_FOLDERS[name])
        val = first_folder(root, VAL_FOLDERS[name])
        if train and val:
            refuse_class_archives(train)
            return [str(train), str(val)]
        refuse_packed(root, "val" if train else "train")
    raise UserError(f"{roots[0]} should hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, with a "
                    f"folder for each of the {CLASSES[name]}: put it there or name its place with "
                    f"--data-dir")


def first_folder(root: Path, names: list[str]) -> Path | None:
    """Returns the first of these that is a folder in `root`."""
    for name in names:
        if os.path.isdir(root / name):
            return root / name
    return None


def refuse_packed(root: Path, missing: str) -> None:
    """Raises UserError if `root` holds archives. missing: train or val, in the name of the one that
    is to be unpacked first."""
    archives = []
    for path in root.glob("*"):
        if path.name.lower().endswith(ARCHIVES) and not path.name.startswith("cifar-10"):
            archives.append(path)
    if archives:
        archive = next((path for path in archives if missing in path.name), archives[0])
        target = root / UNPACKED_AS.get(archive.name, "")
        raise UserError(f"{root} holds {archive.name}, which is not unpacked yet: "
                        f"{unpacking(archive, target)}; or name the place of the images with "
                        f"--data-dir")


def refuse_archive(path: str, flag: str) -> None:
    """Raises UserError, which says how to unpack it, if `path` is a .zip or .tar file."""
    if not path.lower().endswith(ARCHIVES) or not os.path.isfile(path):
        return
    folder = path.lower().removesuffix(".gz")
    folder = path[:len(folder) - 4]                             # without .zip, .tar or .tgz
    raise UserError(f"{path} is an archive: {unpacking(Path(path), Path(folder))}; then {flag} "
                    f"{shlex.quote(folder)}")


def refuse_class_archives(train: Path) -> None:
    """Raises UserError if ImageNet's training images are still in an archive for each class."""
    archive = next(train.glob("n*.tar"), None)
    if archive is not None:
        raise UserError(
            f"{train} holds archives such as {archive.name}: unpack each into a folder of its own: "
            f"cd {shlex.quote(str(train))} && for f in n*.tar; do mkdir ${{f%.tar}} && "
            f"tar -xf $f -C ${{f%.tar}} && rm $f; done")


def unpacking(archive: Path, folder: Path) -> str:
    """Returns the shell's command that unpacks an archive into a folder."""
    source = shlex.quote(str(archive))
    target = shlex.quote(str(folder))
    if archive.suffix.lower() == ".zip":
        return f"unzip -q {source} -d {target}"
    return f"mkdir -p {target} && tar -xf {source} -C {target}"


# ---- which class an image has

def by_scene(root: str, by_class: dict[str, list[str]]) -> dict[str, list[str]]:
    """Returns the images of Places2 by scene, also if the folders in `root` are initial letters.

    a/apartment_building/outdoor becomes apartment_building-outdoor, as where they are sorted."""
    if any(len(name) > 1 for name in by_class):
        return by_class
    scenes = {}
    for letter, paths in by_class.items():
        prefix = os.path.join(root, letter, "")
        for path in paths:
            scene, _, _ = path.removeprefix(prefix).rpartition(os.sep)
            scenes.setdefault(scene.replace(os.sep, "-"), []).append(path)
    return scenes


def label_flat(folder: str, images: list[str], classes: Iterable[str]) -> dict[str, list[str]]:
    """Returns the images of a folder without class folders by class, as a file near it says.

    images: sorted. classes: those of the training images. Raises UserError if there is no such
    file: Kaggle's or Places2's, or a text file with the class of each image in their order."""
    above = [Path(folder), *Path(folder).parents[:4]]
    files = [place / name for place in above for name in (KAGGLE_LABELS, PLACES_LABELS)]
    for place in above[:2]:
        files += sorted(place.glob("*.txt"))
    by_class = {name: [] for name in classes}
    for file in files:
        if not file.exists():
            continue
        labels = read_labels(file, images, by_class)
        if set(labels) <= by_class.keys():
            for label, image in zip(labels, images, strict=True):
                by_class[label].append(image)
            return by_class
    raise UserError(f"{folder} holds {len(images)} images in no class folder: put a file that "
                    f"names their classes beside it: {KAGGLE_LABELS} (ImageNet), {PLACES_LABELS} "
                    f"and {PLACES_CLASSES} (Places2), or a .txt file of {len(images)} lines, the "
                    f"class of each image in the order of the names")


def read_labels(file: Path, images: list[str], classes: Iterable[str]) -> list[str]:
    """Returns the class of each image as a file says, "" where it does not.

    A line of the file is a class; or the name of an image and a class; or, if PLACES_CLASSES lies
    beside it, the name of an image and the number of a class."""
    lines = file.read_text(errors="replace").strip().splitlines()
    names = [line.strip() for line in lines]
    if len(names) == len(images) and set(names) <= set(classes):
        return names
    numbered = {}
    scenes = file.with_name(PLACES_CLASSES)
    if scenes.exists():
        for line in scenes.read_text().splitlines():            # /a/apartment_building/outdoor 8
            scene, _, number = line.strip().rpartition(" ")
            numbered[number] = scene[3:].replace("/", "-")
    labels = {}
    for line in lines:
        row = line.replace(",", " ").split()
        if len(row) > 1:
            labels[Path(row[0]).stem] = numbered.get(row[1], row[1])
    return [labels.get(Path(image).stem, "") for image in images]
