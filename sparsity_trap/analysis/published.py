"""Numbers printed in the published paper, shown beside the reproduced ones and never mixed in.

All are for test patient P5, Hist2ST decoder on Virchow2. Copy a table before changing it.
"""

from __future__ import annotations

import pandas as pd

#: Results table. PCC and SSIM as printed: pooled or averaged as the paper did, mask ignored at 8 µm.
ARMS = pd.DataFrame(
    [
        ("A", "8 µm", "mse", 0.347, 0.502, 0.511, 0.141),
        ("B", "A, bicubic to 2 µm", None, 0.356, 0.157, 0.511, 0.141),
        ("C", "8 µm", "poisson", 0.354, 0.547, 0.524, 0.171),
        ("D", "2 µm", "mse", 0.356, 0.277, 0.253, 0.087),
        ("E", "2 µm", "poisson", 0.349, 0.553, 0.510, 0.174),
        ("V7", "2, 4, 8, 16 µm together", "poisson", 0.355, 0.548, 0.526, 0.171),
    ],
    columns=["arm", "trained_at", "loss", "pcc_2um", "ssim_2um", "pcc_8um", "ssim_8um"],
)

#: Mean sparsity (fraction), mean gain in PCC at 8 µm and genes won by Poisson, per category.
CATEGORIES = pd.DataFrame(
    [
        ("secretory", 0.954, 0.236, 3, 4),
        ("stromal", 0.967, 0.230, 6, 6),
        ("immune", 0.964, 0.208, 6, 6),
        ("epithelial", 0.966, 0.178, 8, 8),
        ("housekeeping", 0.956, 0.164, 10, 10),
        ("mitochondrial", 0.841, 0.139, 9, 10),
        ("overall", 0.939, 0.180, 48, 50),
    ],
    columns=["category", "mean_sparsity", "mean_delta", "n_wins", "n_genes"],
)

#: Genes shown as rescued: PCC at 8 µm of both arms and gain in SSIM at 2 µm.
RESCUES = pd.DataFrame(
    [
        ("MUC12", 0.037, 0.521, 0.401),
        ("MT-ND3", 0.267, 0.689, 0.099),
        ("JCHAIN", 0.098, 0.490, 0.223),
        ("DES", -0.034, 0.288, 0.427),
        ("FCGBP", 0.055, 0.350, 0.445),
    ],
    columns=["gene", "pcc_8um_mse", "pcc_8um_poisson", "delta_ssim_2um"],
)

#: Per-gene summary of arms D (MSE) and E (Poisson), and the sparsity association.
SUMMARY: dict[str, float] = {
    "n_genes": 50,
    "n_wins": 48,
    "pcc_8um_mse": 0.188,
    "pcc_8um_poisson": 0.368,
    "mean_delta": 0.180,
    "ssim_2um_mse": 0.277,
    "ssim_2um_poisson": 0.553,
    "rho": 0.243,
    "mean_sparsity": 0.939,
    "img2st_pcc_8um": 0.368,
    "n_patches.P1": 576,
    "n_patches.P2": 601,
    "n_patches.P5": 570,
}
