"""Judges a trained run: are samples of the classes that were asked for, and do they differ among themselves?

    python evaluate.py                              # the newest run
    python evaluate.py --run runs/shapes --num 1000 --seed 0

A small residual classifier is trained once on the run's real training images and kept with it (classifier.pt). Then
`--num` images are sampled, classes balanced, and the classifier names them.
"""
import argparse
import json
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import devices
import runtime
from data import batches, open_data
from maskgit import SCHEDULES
from sample import draw, load_run


class Classifier(nn.Module):
    """(B, 3, S, S) in [0, 1] -> class logits (B, classes): four residual stages, each halving the resolution."""

    def __init__(self, classes, width=24):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in zip([width] + widths, widths)])
        self.same = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1)) for w in widths])
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, images):
        x = self.stem(images * 2 - 1)
        for down, same in zip(self.down, self.same):
            x = down(F.relu(x))
            x = x + same(x)
        return self.out(F.relu(x).mean((2, 3)))


def train_classifier(path, train, val, steps, seed, device):
    """Loads the classifier kept at `path`, or trains it on real images -> (classifier, its accuracy on validation images)."""
    model = Classifier(len(train.classes)).to(device)
    if path.exists():
        checkpoint = runtime.load_checkpoint(path, "classifier")
        if checkpoint["classes"] == list(train.classes) and checkpoint["steps"] == steps:
            return runtime.load_weights(model, checkpoint["model"], path).eval(), checkpoint["accuracy"]
    torch.manual_seed(seed)
    model = Classifier(len(train.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step, (images, labels) in enumerate(batches(train, 128, seed, 0, steps)):
        optimizer.param_groups[0]["lr"] = runtime.learning_rate(step, 3e-3, 50, steps, decay=True)
        loss = F.cross_entropy(model(images.to(device).float() / 255), labels.to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"classifier: step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval()
    right = total = 0
    for start in range(0, len(val), 250):
        images, labels = val.batch(torch.arange(start, min(start + 250, len(val))).numpy())
        right += (classify(model, images.to(device).float() / 255) == labels.to(device)).sum().item()
        total += len(labels)
    runtime.save_checkpoint(path, {"kind": "classifier", "model": model.state_dict(), "classes": list(train.classes),
                                   "steps": steps, "accuracy": right / total})
    return model, right / total


@torch.no_grad()
def classify(model, images):
    """(n, 3, S, S) in [0, 1] -> the likeliest classes (n,)."""
    return torch.cat([model(part).argmax(1) for part in images.split(250)])


def evaluate(args, machine):
    if args.num < 1:
        raise ValueError("--num must be at least 1")
    device = machine.device
    folder, tokenizer, transformer, checkpoint = load_run(args.run, device)
    train, val = open_data(checkpoint["data"], checkpoint["image_size"])
    classifier, accuracy = train_classifier(folder / "classifier.pt", train, val, args.classifier_steps, 0, device)

    labels = torch.arange(args.num, device=device) % len(train.classes)
    started = time.time()
    images, _ = draw(tokenizer, transformer, labels, batch=100, steps=args.steps, schedule=args.schedule, top_k=args.top_k,
                     choice_temperature=args.choice_temperature, temperature=args.temperature,
                     generator=machine.generator(args.seed))
    seconds = time.time() - started
    right = (classify(classifier, images) == labels).float()
    real, real_labels = val.batch(torch.arange(min(1000, len(val))).numpy())
    real, real_labels = real.to(device).float() / 255, real_labels.to(device)
    restored = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in real.split(100)])
    psnr = -10 * (restored - real).square().mean((1, 2, 3)).log10().mean()
    # How far apart two images of a class are: near 0 where samples all look alike.
    spread = lambda x, y: torch.stack([torch.pdist(x[y == c].flatten(1)).mean() for c in y.unique() if (y == c).sum() > 1]).mean()
    result = {"run": str(folder), "images": args.num, "steps": args.steps, "schedule": args.schedule, "seed": args.seed,
              "classifier on real validation images": accuracy, "on samples": right.mean().item(),
              "on samples, by class": {name: round(right[labels == i].mean().item(), 3) for i, name in enumerate(train.classes) if (labels == i).any()},
              "on reconstructions": (classify(classifier, restored) == real_labels).float().mean().item(),
              "reconstruction PSNR, dB": psnr.item(), "reconstruction sharpness / real": (runtime.sharpness(restored) / runtime.sharpness(real)).item(),
              "sample sharpness / real": (runtime.sharpness(images) / runtime.sharpness(real)).item(),
              "spread of samples / real": (spread(images, labels) / spread(real, real_labels)).item(), "sampling, images/s": args.num / seconds}
    for name, value in result.items():
        print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")
    runtime.write_atomically(folder / "eval.json", lambda file: file.write(json.dumps(result, indent=1).encode()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the run's folder (default: the newest in runs/ that holds a transformer)")
    parser.add_argument("--num", type=runtime.whole, default=1000, help="images to sample (default: %(default)s)")
    parser.add_argument("--steps", type=runtime.whole, default=8, help="decoding steps (default: %(default)s)")
    parser.add_argument("--schedule", default="cosine", help=f"mask schedule: {', '.join(SCHEDULES)} (default: %(default)s)")
    parser.add_argument("--choice-temperature", type=runtime.positive, default=4.5, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=runtime.positive, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=runtime.whole, help="(default: all)")
    parser.add_argument("--seed", type=runtime.whole, default=0, help="(default: %(default)s)")
    parser.add_argument("--classifier-steps", type=runtime.whole, default=1000, help="training steps of the classifier (default: %(default)s)")
    devices.add_machine_flags(parser)
    devices.launch(evaluate, parser.parse_args())


if __name__ == "__main__":
    devices.command_line(main)
