"""Masked tokens for masked language models (Devlin et al. 2018, 1810.04805, section 3.1).

Which they are follows from the seed, the epoch and the number of the sample alone, by a generator
that counts (Philox, Salmon et al. 2011): no worker, rank, order or resume can change them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from overture.data.collate import TokenCollator
from overture.data.encode import special_tokens


class MaskingCollator:
    """Makes of the batches of TokenCollator those of a masked language model.

    Of the tokens of each row that are not special `share`, above 0 and below 1, get a label, at
    least one and always as many: the token's own id at its own place. Of these 80 % become the mask
    token in `input_ids`, 10 % any ordinary token, 10 % stay. `anew` is for training: each epoch has
    others; else all have the same, and so has always a row that a stream repeats within an epoch.
    """

    def __init__(
        self, collate: TokenCollator, tokenizer: Any, share: float, seed: int, anew: bool
    ) -> None:
        self.collate, self.share, self.seed, self.anew = collate, share, seed, anew
        self.mask = tokenizer.mask_token_id
        self.is_ordinary = np.ones(len(tokenizer), bool)
        self.is_ordinary[[*special_tokens(tokenizer).values()]] = False
        self.ordinary = np.flatnonzero(self.is_ordinary)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        ids = batch["input_ids"].numpy()  # masked in place
        labels, counts = np.full(ids.shape, -100, np.int64), []
        for row, own, learned in zip(rows, ids, labels, strict=True):
            places = np.flatnonzero(self.is_ordinary[own[: len(row["input_ids"])]])
            count = min(max(round(self.share * len(places)), 1), len(places))
            # Numbers that belong to a row in an epoch.
            key = np.array([self.seed, row["epoch"] if self.anew else 0], np.uint64)
            drawn = np.random.Philox(key=key, counter=[0, row["sample_id"], 0, 0])
            draws = drawn.random_raw(len(places) + 2 * count)
            order, fates, words = np.split(draws, [len(places), len(places) + count])
            chosen = places[order.argsort(kind="stable")[:count]]
            learned[chosen] = own[chosen]
            masked, changed = chosen[fates % 10 < 8], fates % 10 == 8
            own[masked] = self.mask
            own[chosen[changed]] = self.ordinary[words[changed] % len(self.ordinary)]
            counts.append(count)
        return batch | {"labels": torch.from_numpy(labels), "num_labels": counts}
