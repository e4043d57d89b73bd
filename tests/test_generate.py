"""Greedy answers: batching and padding change nothing; held-out prompts come from the shards."""

import pytest
import torch

from overture.config.schema import ModelConfig
from overture.data.streams import TokenStream
from overture.models.build import load_network
from overture.tokenizer import load_tokenizer
from overture.training.answers import greedy_answers, held_out_prompts, is_exact


@pytest.fixture(scope="module")
def pair(smoke):
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    torch.manual_seed(3)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.5,
    }  # fmt: skip
    config = ModelConfig("llama", False, "float32", "auto", shape)
    return load_network(config, tokenizer), tokenizer


def test_prompts_and_answers_are_those_of_the_records(smoke, pair):
    _, tokenizer = pair
    dataset = TokenStream(local=str(smoke / "instruct"), split="test", batch_size=1)
    pairs = held_out_prompts(dataset, 1000)
    assert len(pairs) == 40  # every document of the split
    for prompt, answer in pairs:
        text = tokenizer.decode(prompt)
        assert text.startswith("### Instruction:\n")
        assert text.endswith("### Response:\n")
        assert tokenizer.eos_token_id not in answer
    assert held_out_prompts(dataset, 3) == pairs[:3]


def test_batched_answers_equal_one_by_one_without_padding(pair):
    model, tokenizer = pair
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21]]
    batched = greedy_answers(model, tokenizer, prompts, 8, 3, "")
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = list(prompt)
        for _ in range(8):  # an independent loop: no cache, no padding
            following = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if following == tokenizer.eos_token_id:
                break
            ids.append(following)
        assert answer == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_model_goes_back_to_training(pair):
    model, tokenizer = pair
    model.train()
    greedy_answers(model, tokenizer, [[5]], 1, 1, "")
    assert model.training


def test_exact_match_ignores_space_at_the_ends_only():
    assert is_exact(" In Oslo\n", "In Oslo")
    assert not is_exact("in Oslo", "In Oslo")
