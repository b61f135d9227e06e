"""GPT-2 written by hand with the verbs of `ggml_bridge.Session`: every matrix product, one attention head at a time.

    python examples/gpt2_by_session.py [steps]

trains a tiny model, character by character, on the documentation texts of Python itself and prints the loss.

The engines of `toy` compute the same thing faster (all heads in one product, a batch of sequences). Here nothing is
folded together, so that the graph can be read from the embedding down to the optimizer.
Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". T tokens, D the width, H heads
of d = D/H, F the width of the MLP, V the size of the vocabulary. Weight matrices are (out, in).
"""

import math
import random
import sys
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

from ggml_bridge import Session


class Config(NamedTuple):
    vocab_size: int
    d_model: int = 64
    n_heads: int = 4
    d_ff: int = 256
    n_layers: int = 2
    context_length: int = 64
    eps: float = 1e-5


def split_heads(arrays, config):
    """The arrays by GGUF name, with the fused attention matrices cut into one piece per head.

    attn_qkv.weight (3D, D) has the rows of q, then k, then v, the heads in order inside each.
    """
    pieces = {}
    for name, array in arrays.items():
        if ".attn_qkv." in name:
            parts = np.asarray(array).reshape(3, config.n_heads, -1, *np.shape(array)[1:])
            for which, part in zip("qkv", parts):
                for head, piece in enumerate(part):
                    pieces[name.replace("qkv", f"{which}.{head}")] = piece  # (d, D) or (d,)
        else:
            pieces[name] = array
    return pieces


def join_heads(pieces, config):
    """The opposite of `split_heads`."""
    arrays = {}
    for name, piece in pieces.items():
        if ".attn_q.0." in name:
            names = [name.replace("q.0", f"{which}.{head}") for which in "qkv" for head in range(config.n_heads)]
            arrays[name.replace("q.0", "qkv")] = np.concatenate([pieces[other] for other in names])
        elif not any(f".attn_{which}." in name for which in "qkv"):
            arrays[name] = piece
    return arrays


class GPT2:
    """A training graph: one sequence a step, weights and gradients by GGUF name.

    weights: {name: array}, see `init_weights` for the names and shapes.
    """

    def __init__(self, config, weights, device="cpu", n_threads=None):
        self.config = config
        s = self.session = Session(device, n_threads)

        # 1. weights: allocate, mark as trained, upload
        pieces = split_heads(weights, config)
        self.w = {}
        for name, array in pieces.items():
            shape = np.shape(array)
            self.w[name] = s.input_1d_f32_persistent(*shape) if len(shape) == 1 else s.input_2d_f32_persistent(*shape)
            s.set_param(self.w[name])
        s.finalize_weights()
        for name, array in pieces.items():
            s.upload_row_major(self.w[name], array)

        # 2. forward
        T = config.context_length
        self.token_ids = s.input_1d_i32(T)
        self.positions = s.input_1d_i32(T)
        x = s.add(
            s.get_rows(self.w["token_embd.weight"], self.token_ids),
            s.get_rows(self.w["position_embd.weight"], self.positions),
        )  # fmt: skip  (T, D)
        for layer in range(config.n_layers):
            x = self.block(x, f"blk.{layer}")  # (T, D)
        x = self.norm(x, "output_norm")
        self.logits = s.matmul(self.w["token_embd.weight"], x)  # (T, V): the head is the embedding (tied)
        s.set_output(self.logits)

        # 3. loss
        self.labels = s.input_1d_i32(T)
        self.loss = s.cross_entropy_loss(self.logits, self.labels)
        s.set_loss(self.loss)

        # 4. backward, and one AdamW step for each weight
        s.build_backward()
        self.gradients_of = {name: s.tensor_grad(weight) for name, weight in self.w.items()}
        self.hp = s.input_2d_f32(1, 7)
        for weight in self.w.values():
            s.opt_step_adamw(weight, self.hp)
        s.realize_backward()

    def norm(self, x, name):
        w = self.w
        return self.session.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], self.config.eps)

    def linear(self, x, name):
        """x @ W.T + b: (T, in) -> (T, out)."""
        s, w = self.session, self.w
        return s.add(s.matmul(w[f"{name}.weight"], x), w[f"{name}.bias"])

    def block(self, x, name):
        """One transformer block: (T, D) -> (T, D)."""
        s = self.session
        x = s.add(x, self.attention(self.norm(x, f"{name}.attn_norm"), name))
        h = s.gelu(self.linear(self.norm(x, f"{name}.ffn_norm"), f"{name}.ffn_up"))  # (T, F)
        return s.add(x, self.linear(h, f"{name}.ffn_down"))

    def attention(self, x, name):
        """Causal self-attention, head by head: (T, D) -> (T, D)."""
        s, config = self.session, self.config
        heads = None
        for head in range(config.n_heads):
            q = self.linear(x, f"{name}.attn_q.{head}")  # (T, d)
            k = self.linear(x, f"{name}.attn_k.{head}")  # (T, d)
            v = self.linear(x, f"{name}.attn_v.{head}")  # (T, d)
            scores = s.scale(s.matmul(k, q), 1 / math.sqrt(config.d_model // config.n_heads))  # q k^T: (T, T)
            p = s.softmax(s.diag_mask_inf(scores, 0))  # row t: what token t takes from the tokens 0..t
            out = s.matmul(s.transpose(v), p)  # p v: (T, d)
            heads = out if heads is None else s.concat(heads, out, 1)  # (T, d), (T, 2d), ... (T, D)
        return self.linear(heads, f"{name}.attn_output")

    def step(self, token_ids, labels, hp, is_first):
        """One training step on one sequence; returns the mean cross-entropy. hp: lr, beta1, beta2, eps, decay, s5, s6."""
        s = self.session
        if is_first:
            s.graph_reset()  # gradients and AdamW's moments
        else:
            s.graph_reset_grads_only()
        s.upload_int_array(self.token_ids, token_ids)
        s.upload_int_array(self.positions, np.arange(self.config.context_length))
        s.upload_int_array(self.labels, labels)
        s.upload_row_major(self.hp, np.reshape(hp, (1, 7)))
        s.compute_backward()
        return float(s.download_row_major(self.loss, 1, 1)[0, 0])

    def weights(self):
        """{name: array} as it is now."""
        return join_heads({name: self.session.download(weight) for name, weight in self.w.items()}, self.config)

    def gradients(self):
        """{name: array} of the last step."""
        pieces = {name: self.session.download(gradient) for name, gradient in self.gradients_of.items()}
        return join_heads(pieces, self.config)

    def close(self):
        self.session.close()


def init_weights(config, seed=0):
    """Normal matrices of standard deviation 0.02 (those that end in the residual stream smaller), gains 1, biases 0."""
    rng = np.random.default_rng(seed)
    D, F = config.d_model, config.d_ff
    weights = {}

    def matrix(name, rows, columns, std=0.02):
        weights[f"{name}.weight"] = rng.normal(0, std, (rows, columns)).astype(np.float32)

    def norm(name):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = np.ones(D, np.float32), np.zeros(D, np.float32)

    def linear(name, rows, columns, std=0.02):
        matrix(name, rows, columns, std)
        weights[f"{name}.bias"] = np.zeros(rows, np.float32)

    matrix("token_embd", config.vocab_size, D)
    matrix("position_embd", config.context_length, D)
    residual = 0.02 / math.sqrt(2 * config.n_layers)
    for i in range(config.n_layers):
        norm(f"blk.{i}.attn_norm")
        linear(f"blk.{i}.attn_qkv", 3 * D, D)
        linear(f"blk.{i}.attn_output", D, D, residual)
        norm(f"blk.{i}.ffn_norm")
        linear(f"blk.{i}.ffn_up", F, D)
        linear(f"blk.{i}.ffn_down", D, F, residual)
    norm("output_norm")
    return weights


def adamw_row(step, lr=3e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    """The seven numbers of step 0, 1, ...: the last two undo the bias of the moments towards zero (Kingma & Ba 2015)."""
    t = step + 1
    return [lr, beta1, beta2, eps, weight_decay, 1 / (1 - beta1**t), 1 / (1 - beta2**t)]


def main(steps=400):
    text = "\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text[:200_000]])
    config = Config(vocab_size=len(characters))
    T = config.context_length
    model = GPT2(config, init_weights(config), n_threads=1)  # the nodes are too small to be worth sharing
    print(f"{len(ids):,} characters, {len(characters)} of them different: an untrained model has a loss of about "
          f"ln {len(characters)} = {math.log(len(characters)):.2f}")  # fmt: skip
    picks, losses = random.Random(0), []
    for step in range(steps):
        start = picks.randrange(len(ids) - T - 1)
        losses.append(model.step(ids[start : start + T], ids[start + 1 : start + T + 1], adamw_row(step), step == 0))
        if (step + 1) % 50 == 0 or step == 0:
            print(f"step {step + 1:4}   loss {np.mean(losses[-50:]):.3f} (mean of the last {len(losses[-50:])})")
    model.close()
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
