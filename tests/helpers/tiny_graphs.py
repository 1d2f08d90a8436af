"""Small graphs on disk, in the exact layout of OGB and of Planetoid, and runs on them that take a second."""

import gzip
import pickle

import numpy as np
import yaml

CLASSES, FEATURES = 40, 128

RECIPE = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_adam_mini.tasks.graph.NodeClassifier",
        "init_args": {"architecture": "gcn", "num_layers": 2, "hidden_size": 16, "dropout": 0.2},
    },
    "data": {
        "class_path": "lightning_adam_mini.tasks.graph.data.OgbArxiv",
        "init_args": {"path": "data", "cache_dir": "cache"},
    },
    "optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini", "init_args": {"lr": 1.0e-2}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
}


def write_numbers(path, rows):
    """A `.csv.gz` file as OGB writes it: no header, numbers with commas between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(",".join(map(str, np.atleast_1d(row).tolist())) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))


def make_arrays(num_nodes=60, num_classes=3, seed=0):
    """Nodes whose class shows in their features and in most of their edges; edges in one direction."""
    draw = np.random.default_rng(seed)
    y = draw.integers(num_classes, size=num_nodes)
    x = (draw.standard_normal((num_nodes, FEATURES)) + 0.5 * y[:, None]).astype(np.float32)
    pairs = {(int(a), int(b)) for a, b in draw.integers(num_nodes, size=(8 * num_nodes, 2)) if a < b}
    edges = np.array(sorted(pair for pair in pairs if y[pair[0]] == y[pair[1]] or draw.random() < 0.2))
    order = draw.permutation(num_nodes)
    train, val, test = np.split(order, [num_nodes // 2, 3 * num_nodes // 4])
    return {"x": x, "y": y, "edges": edges, "train": train, "val": val, "test": test}


def write_ogb(root, name="ogbn_arxiv", **changed):
    """`root/NAME` as OGB's zip file unpacks; arrays may be replaced."""
    arrays = make_arrays() | changed
    folder = root / name
    raw, split = folder / "raw", folder / "split" / "time"
    write_numbers(raw / "edge.csv.gz", arrays["edges"])
    write_numbers(raw / "node-feat.csv.gz", arrays["x"])
    write_numbers(raw / "node-label.csv.gz", arrays["y"])
    write_numbers(raw / "node_year.csv.gz", np.full(len(arrays["x"]), 2017))
    write_numbers(raw / "num-node-list.csv.gz", [len(arrays["x"])])
    write_numbers(raw / "num-edge-list.csv.gz", [len(arrays["edges"])])
    for part, file in (("train", "train"), ("val", "valid"), ("test", "test")):
        write_numbers(split / f"{file}.csv.gz", arrays[part])
    (folder / "RELEASE_v1.txt").write_text("")
    return folder


def write_planetoid(root, name="Cora", num_features=12, num_classes=3):
    """`root/NAME/raw/ind.name.*` with 6 training, 500 validation and 10 test nodes; returns features and labels."""
    from scipy.sparse import csr_matrix

    draw = np.random.default_rng(0)
    num_train, num_rest, num_test = 6, 510, 10
    labels = draw.integers(num_classes, size=num_train + num_rest + num_test)
    labels[:num_classes] = range(num_classes)
    features = (draw.random((len(labels), num_features)) < 0.4).astype(np.float32)
    one_hot = np.eye(num_classes, dtype=np.int32)[labels]
    known = num_train + num_rest
    test_numbers = known + draw.permutation(num_test)
    neighbours = {node: [] for node in range(len(labels))}
    for node in range(len(labels)):
        other = (node + 1) % len(labels)
        neighbours[node].append(other)
        neighbours[other].append(node)
    parts = {
        "x": csr_matrix(features[:num_train]),
        "tx": csr_matrix(features[test_numbers]),
        "allx": csr_matrix(features[:known]),
        "y": one_hot[:num_train],
        "ty": one_hot[test_numbers],
        "ally": one_hot[:known],
        "graph": neighbours,
    }
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, value in parts.items():
        (raw / f"ind.{name.lower()}.{part}").write_bytes(pickle.dumps(value, protocol=2))
    (raw / f"ind.{name.lower()}.test.index").write_text("".join(f"{number}\n" for number in test_numbers))
    return features, labels


def write_recipe(folder, **sections):
    """`tiny.yaml` in a folder, with options of model, data or trainer changed, and its graph beside it."""
    if not (folder / "data").exists():
        write_ogb(folder / "data")
    recipe = {name: dict(section) if isinstance(section, dict) else section for name, section in RECIPE.items()}
    for name, options in sections.items():
        if name == "trainer":
            recipe["trainer"] |= options
        else:
            recipe[name]["init_args"] = recipe[name]["init_args"] | options
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
