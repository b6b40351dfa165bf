"""The whole method on one page: preference optimisation with an explicit reference policy.

    python tests/support/microdpo.py --model FOLDER --pairs pairs.jsonl --objective dpo --reference initial \\
        --beta 0.1 --lr 1e-3 --batch 4 --steps 5

A line of the file is a pair: a prompt x, a chosen response y_w, a rejected response y_l. The policy pi and the
reference pi_ref say how likely either response is, an objective makes a loss of these four numbers, AdamW lowers it.
One sequence at a time, full logits, no padding, no dropout; pairs in the file's order, then round again; a constant
learning rate. Log-probs are in nats, sums over a response in float64. tests/training/test_microdpo.py holds us to it.
"""

import argparse
import json

import torch
from torch.nn.functional import logsigmoid, relu
from transformers import AutoModelForCausalLM, AutoTokenizer


def encode(tokenizer, prompt, response):
    """Token ids: of the prompt, a user's text or messages, up to where the assistant begins; of the response, which is
    scored, through the token that ends its turn. BOS is there if the template writes it."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [*turns, {"role": "assistant", "content": response}]
    before = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    prompt_ids, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, whole))
    while ids[-1] not in tokenizer.all_special_ids:  # what a template writes behind the turn, such as a line break
        ids.pop()
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(f"a token straddles the end of the prompt and {response!r}; see docs/data.md")
    return prompt_ids, ids[len(prompt_ids) :]


def response_logps(model, prompt_ids, response_ids):
    """log p(y | x) = sum over t of log p(y_t | x, y_<t), a scalar."""
    ids = torch.tensor([*prompt_ids, *response_ids])  # [T]
    logps = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)  # [T, V]; row t predicts token t + 1
    first = len(prompt_ids)
    return logps[first - 1 : -1].gather(1, ids[first:, None]).double().sum()


# References (arXiv 2407.13709): each gives log pi_ref as a function of prompt and response.
def initial(folder, other_folder, begin, dtype):
    """log pi_0(y | x): the policy as it was before training."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return lambda prompt_ids, response_ids: response_logps(model, prompt_ids, response_ids)


def other(folder, other_folder, begin, dtype):
    """log p(y | x) of another model that reads the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(other_folder, dtype=dtype)
    return lambda prompt_ids, response_ids: response_logps(model, prompt_ids, response_ids)


def prior(folder, other_folder, begin, dtype):
    """log pi_0(y) without the prompt: behind BOS alone, EOS where there is none. With dpo the likelihood reward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return lambda prompt_ids, response_ids: response_logps(model, [begin], response_ids)


def none(folder, other_folder, begin, dtype):
    """0. With dpo the posterior-probability reward, beta log pi(y | x)."""
    return lambda prompt_ids, response_ids: torch.zeros((), dtype=torch.float64)


# Objectives: the loss of one pair. policy, reference and lengths (in tokens) are vectors of two: of y_w and of y_l.
def margin(policy, reference):
    """h = log(pi(y_w | x) / pi_ref(y_w | x)) - log(pi(y_l | x) / pi_ref(y_l | x)), in nats."""
    chosen, rejected = policy - reference
    return chosen - rejected


def dpo(policy, reference, lengths, beta):
    """-log sigmoid(beta h) (arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(beta * margin(policy, reference))


def ipo_sum(policy, reference, lengths, beta):
    """(h - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17, where beta is called tau)."""
    return (margin(policy, reference) - 1 / (2 * beta)) ** 2


def hinge(policy, reference, lengths, beta):
    """max(0, 1 - beta h): SLiC's loss (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657)."""
    return relu(1 - beta * margin(policy, reference))


def simpo(policy, reference, lengths, beta, gamma=1.0):
    """-log sigmoid(beta log pi(y_w | x) / |y_w| - beta log pi(y_l | x) / |y_l| - gamma) (arXiv 2405.14734)."""
    chosen, rejected = beta * policy / lengths
    return -logsigmoid(chosen - rejected - gamma)


def sft(policy, reference, lengths, beta):
    """-log pi(y_w | x) / |y_w|: how unlikely the chosen response is, per token. Like simpo it has no reference."""
    return -policy[0] / lengths[0]


def losses(policy, reference, objective, pairs, beta, lr, batch, steps):
    """Train the policy in place; yields the mean loss of each step's pairs, before its update."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(steps):
        pair_losses = []
        for index in range(step * batch, (step + 1) * batch):
            pair = pairs[index % len(pairs)]
            policy_logps = torch.stack([response_logps(policy, *ids) for ids in pair])
            with torch.no_grad():
                reference_logps = torch.stack([reference(*ids) for ids in pair])
            lengths = torch.tensor([len(response_ids) for _, response_ids in pair])
            pair_losses.append(objective(policy_logps, reference_logps, lengths, beta))
        loss = torch.stack(pair_losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


OBJECTIVES = {"dpo": dpo, "ipo_sum": ipo_sum, "hinge": hinge, "simpo": simpo, "sft": sft}
REFERENCES = {"initial": initial, "other": other, "prior": prior, "none": none}


def main(arguments=None):
    """Read the pairs, train, print one loss a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--objective", choices=OBJECTIVES, required=True)
    parser.add_argument("--reference", choices=REFERENCES, required=True)
    parser.add_argument("--reference-model")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    with open(args.pairs) as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [[encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows]
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    reference = REFERENCES[args.reference](args.model, args.reference_model, begin, args.dtype)
    objective = OBJECTIVES[args.objective]
    for loss in losses(policy, reference, objective, pairs, args.beta, args.lr, args.batch, args.steps):
        print(loss)


if __name__ == "__main__":
    main()
