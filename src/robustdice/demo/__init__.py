"""What ``robustdice demo`` runs on: a small trained network for scikit-learn's digits."""
