"""A state-space model: it has no positions, and its loss is the family's own."""

import numpy as np
import pytest

from overture.config.schema import ModelConfig
from overture.data.collate import TokenCollator
from overture.models.build import load_network
from overture.models.causal_lm import CausalLM
from overture.models.isolation import prove_isolation
from overture.tokenizer import load_tokenizer


def test_a_model_without_positions_is_trained(smoke):
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    network = load_network(ModelConfig("mamba", False, "float32", "auto", shape), tokenizer)
    prove_isolation(network, len(tokenizer), 512, packed=False)
    model, ends = CausalLM(network, tokenizer, None), np.array([24], np.uint32)
    ids = np.random.default_rng(0).integers(0, len(tokenizer), 24).astype(np.uint16)
    row = {"input_ids": ids, "loss_mask": np.ones(24, np.uint8), "document_ends": ends}
    batch = TokenCollator(32, tokenizer.pad_token_id)([row | {"sample_id": 0}])
    theirs = network(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert model.loss(model(batch), batch).item() == pytest.approx(theirs, rel=1e-4)
