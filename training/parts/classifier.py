"""A small image classifier, trained on real images, that judges class-conditional samples."""

from itertools import chain, islice

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import nn
from tqdm.auto import tqdm

from .batches import BucketBatchSampler


# passes over the images that it is trained on
EPOCHS = 6


def make_classifier(channels, num_classes):
    """Five convolutions for images (B, channels, H, W) in [-1, 1], to logits (B, num_classes)."""

    def block(inputs, outputs, stride):
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 16, 1),
        *block(16, 32, 2),
        *block(32, 32, 1),
        *block(32, 64, 2),
        *block(64, 64, 1),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 16, num_classes),
    )


def train_classifier(dataset, epochs, seed, device, batch_size=128):
    """A classifier of the dataset's classes, in evaluation mode."""
    torch.manual_seed(seed)
    classifier = make_classifier(dataset.shape[0], dataset.num_classes).to(device)
    if dataset.buckets is None:
        loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=len(dataset) >= batch_size)
        steps, batches = epochs * len(loader), chain.from_iterable(loader for _ in range(epochs))
    else:  # each batch of one size
        batch_size = min(batch_size, len(dataset))
        steps = epochs * (len(dataset) // batch_size)
        sampler = BucketBatchSampler(dataset.buckets, batch_size, batch_size, seed, rank=0, world_size=1)
        batches = islice(torch.utils.data.DataLoader(dataset, batch_sampler=sampler), steps)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    bar = tqdm(total=steps, desc="training the classifier", unit="step")
    for batch in batches:
        images, labels = batch["images"].to(device), batch["labels"].to(device)
        flipped = torch.rand(len(images), 1, 1, 1, device=device) < 0.5
        loss = F.cross_entropy(classifier(torch.where(flipped, images.flip(-1), images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.update()
    bar.close()
    return classifier.eval()


@torch.no_grad()
def recognises(classifier, images, labels):
    """Whether each of the images (N, C, H, W) in [-1, 1] is recognised as its label, (N,)."""
    return torch.cat([classifier(part).argmax(1) for part in images.split(256)]) == labels


def accuracy(classifier, images, labels):
    """Share of images (N, C, H, W) in [-1, 1] that are recognised as their label (N,)."""
    return recognises(classifier, images, labels).float().mean().item()


def trained_classifier(data, epochs, seed, device):
    """A classifier of the classes of a dataset, the same in all processes."""
    network = train_classifier(data, epochs, seed, device)
    for values in network.state_dict().values():
        broadcast(values)
    return network
