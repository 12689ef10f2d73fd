"""The federation beside what it is compared with: references, variants, ablations, robustness, and how they are shown."""
