"""Small models of random weights, token ids and a tokenizer for them."""

import tokenizers
import torch
import transformers

WORDS = ["is", "this", "a", "good", "review", "?", "great", "bad", "not", "at", "all"]
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=48, pad_token_id=0))


def gpt2():
    config = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=1, eos_token_id=2))


def gemma():
    """Its embeddings are scaled by √d."""
    config = transformers.Gemma3TextConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=32
    )
    return transformers.Gemma3ForCausalLM(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=48))


def vit():
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**config, image_size=16, patch_size=8))


def tokens(rows=3, t=6):
    return torch.randint(3, 50, (rows, t))


def tokenizer():
    """A word a token, and [CLS] in front of what is not asked to be without."""
    ids = {"[UNK]": 1, **{word: i + 5 for i, word in enumerate(WORDS)}}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    own.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
