"""Several agents in one environment: MaMuJoCo, MPE, level-based foraging, and whatever PettingZoo has."""
