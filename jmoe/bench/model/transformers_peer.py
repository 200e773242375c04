"""The same step of the optimizer by transformers and PEFT: bfloat16 experts, FlexAttention, gradient checkpointing."""

import statistics
import time

from jmoe.bench.model.case import Figures, ModelCase

STEPS = 5
"""Of which the first compiles and is not counted."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def measure(case: ModelCase) -> Figures:
    """The median step and the most memory that torch held.

    Raises:
      ImportError: torch, transformers or PEFT is missing.
    """
    import peft
    import torch
    import transformers

    config = transformers.GptOssConfig(
        num_hidden_layers=case.config.num_hidden_layers,
        num_local_experts=case.config.num_local_experts,
        hidden_size=case.config.hidden_size,
        intermediate_size=case.config.intermediate_size,
        vocab_size=case.config.vocab_size,
        use_cache=False,
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="flex_attention"
        )
    lora = peft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=PROJECTIONS, target_parameters=EXPERTS)
    model = peft.get_peft_model(model, lora)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    times = []
    for _ in range(STEPS):
        tokens = torch.randint(0, case.config.vocab_size, (case.sequences, case.length), device="cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step = statistics.median(times[1:])
    return {
        "step_ms": 1e3 * step,
        "tokens_per_second": case.sequences * case.length / step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "compile_seconds": times[0],
        "versions": {"transformers": transformers.__version__, "peft": peft.__version__},
    }
