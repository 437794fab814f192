"""Before the first step: the text tower alone learns which captions say the same.

At first the embeddings of all captions lie close together, so that pictures are drawn nowhere, and as long as
pictures go nowhere captions don't either. Two captions of one picture are a pair as a picture and its caption are:
the same objective over them reads no picture, and gives the image tower something to learn from its first step on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from clipcli.model.clip import CLIP
from clipcli.model.text import pad
from clipcli.tokenizer import Tokenizer, cut
from clipcli.train.config import TrainConfig
from clipcli.train.feed import ALONE, Feed
from clipcli.train.loss import contrastive_loss, truth
from clipcli.train.optim import learning_rate, optimiser
from clipcli.train.words import Words


def warm_text(clip: CLIP, tokenizer: Tokenizer, words: Words, feed: Feed, config: TrainConfig) -> list[float]:
    """Take `text_warmup` steps of the text tower, on the device where the weights are; the loss of each.

    The seed alone decides on them, and the optimiser's state is not kept. A frozen text tower takes none.
    """
    device, most = clip.text_projection.device, clip.positional_embedding.shape[0]
    scale = torch.tensor(config.first_scale, device=device)
    adam, losses = optimiser(clip, config), []
    for step in range(config.text_warmup if config.freeze != "text" else 0):
        for group in adam.param_groups:
            group["lr"] = learning_rate(config, step, config.text_warmup)
        chosen = np.random.default_rng((config.seed, 4, step)).choice(feed.chosen, config.batch_size)
        pairs = [feed.pairs[index] for index in chosen]
        captions = [words.captions(pairs, number, ALONE) for number in (2 * step, 2 * step + 1)]
        ids = [cut(row, most) for row in tokenizer(text for both in captions for text, _ in both)]
        one, other = F.normalize(clip.encode_text(pad(ids).to(device)), dim=1).chunk(2)
        said = np.asarray([phrase for _, phrase in captions[1]], np.int64)
        targets = torch.from_numpy(truth([words.true_of(pair) for pair in pairs], said)).to(device)
        loss = contrastive_loss(one, other, scale, targets)
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(clip.parameters(), config.clip_gradient or torch.inf)
        adam.step()
        losses.append(float(loss.detach()))
    return losses
