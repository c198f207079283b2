"""A card's facts, invented but of the right form."""


def fake_row(name, kind, disk, bits_per_weight, relative, speed, **what):
    base = 1.9
    return {"name": name, "what": {"kind": kind, "trained_on": False, **what}, "parameters": 2_163_840,
            "disk_bytes": disk, "memory_bytes": disk - 4_000, "bits_per_weight": bits_per_weight,
            "bits_per_byte": base * (1 + relative),
            "interval": [base * (1 + relative) - 0.03, base * (1 + relative) + 0.03], "difference": base * relative,
            "difference_interval": [base * relative * 0.8 - 1e-4, base * relative * 1.2 + 1e-4], "relative": relative,
            "lossy": 0, "kl_mean": abs(relative) / 2, "kl_p99": abs(relative) * 6,
            "top1_agreement": 1 - abs(relative), "brier": 0.6,
            "calibration_error": 0.012 + abs(relative) / 4, "front": True, "bandwidth_share": 0.31,
            "worst": [{"id": "lib/python3.11/<script>.py", "bytes": 1200, "before": 1.7,
                       "after": 1.7 * (1 + 4 * relative)}],
            "tokens_per_s": {"1": {"median": speed, "min": speed * 0.9, "max": speed * 1.1},
                             "16": {"median": speed * 4, "min": speed * 3, "max": speed * 5}}}


def fake_card():
    integers = {"group": 32, "activations": "float"}
    rows = [fake_row("first", "whole", 8_660_000, 32.0, 0.0, 900.0),
            fake_row("first-int8", "integers", 2_310_000, 8.52, 0.0006, 1500.0, bits=8, method="rtn", **integers),
            fake_row("first-int4-rtn", "integers", 1_230_000, 4.52, 0.031, 1900.0, bits=4, method="rtn", **integers),
            fake_row("first-int4-gptq", "integers", 1_230_000, 4.52, 0.0152, 1900.0, bits=4, method="gptq", **integers),
            fake_row("first-qat-int4", "integers", 1_230_000, 4.52, -0.004, 1890.0, bits=4, method="rtn", **integers)
            | {"what": {"kind": "integers", "trained_on": True, "bits": 4, "method": "rtn", **integers}},
            fake_row("first-pruned", "pruned", 6_050_000, 32.0, 0.42, 1200.0) | {"parameters": 1_512_000},
            fake_row("first-pruned-distilled", "whole", 6_050_000, 32.0, 0.027, 1210.0)
            | {"what": {"kind": "whole", "trained_on": True}, "parameters": 1_512_000},
            fake_row("first-trimmed", "trimmed", 8_300_000, 32.0, 0.0008, 910.0)
            | {"kl_mean": None, "kl_p99": None, "top1_agreement": None}]
    from dougong.recipes.card import pareto

    for row, best in zip(rows, pareto(rows)):
        row["front"] = best
    return {"run": "first", "split": "test", "documents": 312, "tokens": 214_000, "bytes": 640_000,
            "close_documents": 40,
            "machine": {"processor": "Intel(R) Xeon(R) Processor @ 2.60GHz", "cores": 2, "memory_bytes": 25e9,
                        "system": "Linux x86_64", "device": "cpu"}, "threads": 2, "bandwidth_bytes_per_s": 1.9e10,
            "written_tokens": 48, "variants": rows}
