"""Services that show the curves of runs: Weights & Biases, SwanLab and MLflow. None is imported unless it is named."""
