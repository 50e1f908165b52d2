"""Manifests for Kubernetes with the KubeRay operator: a cluster, or a job that brings its own.

Secrets come from a Kubernetes Secret that the pods read into their environment; a manifest holds
its name alone. Ray's own token is made by the operator (``authOptions``, KubeRay 1.5 or newer).
"""

from typing import Any

from orchestration.clusters.shape import NodeType, Shape, ShapeError

STUDY_FILE = "/etc/comp/study.yaml"


def cluster(shape: Shape, ray_version: str) -> dict[str, Any]:
    """Returns a RayCluster.

    Args:
        shape: The cluster.
        ray_version: Version of Ray in the image.

    Raises:
        ShapeError: If the shape has no image, or setup commands.
    """
    return _object("RayCluster", shape, _cluster_spec(shape, ray_version))


def job(shape: Shape, ray_version: str, study: str) -> list[dict[str, Any]]:
    """Returns a ConfigMap with a study's spec and a RayJob that runs it on a cluster of its own.

    The job is tried again on a new cluster when its head is lost, which continues the study: the
    storage outlives the cluster.

    Args:
        shape: The cluster; its storage must be a URI that every pod reaches.
        ray_version: Version of Ray in the image.
        study: The YAML text of the study's spec.

    Raises:
        ShapeError: If the shape has no image or no storage.
    """
    if not shape.storage:
        raise ShapeError(
            "a job on Kubernetes needs storage that outlives its pods; set storage, for example "
            "storage: s3://bucket/comp"
        )
    spec = _cluster_spec(shape, ray_version)
    head = spec["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [{"name": "study", "configMap": {"name": f"{shape.name}-study"}}]
    mount = {"name": "study", "mountPath": "/etc/comp", "readOnly": True}
    head["containers"][0]["volumeMounts"] = [mount]
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{shape.name}-study", shape),
        "data": {"study.yaml": study},
    }
    job_spec = {
        "entrypoint": f"comp study run {STUDY_FILE}",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "backoffLimit": 3,
        "rayClusterSpec": spec,
    }
    return [config, _object("RayJob", shape, job_spec)]


def _object(kind: str, shape: Shape, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _metadata(shape.name, shape)
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _metadata(name: str, shape: Shape) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": shape.name, "app.kubernetes.io/part-of": "comp"}
    return {"name": name, "namespace": shape.namespace, "labels": labels}


def _cluster_spec(shape: Shape, ray_version: str) -> dict[str, Any]:
    if not shape.image:
        raise ShapeError(
            "Kubernetes runs containers, so the cluster needs an image with Ray and comp-vlm in "
            "it; set image"
        )
    if shape.setup:
        raise ShapeError(
            f"setup commands ({shape.setup[0]!r}, ...) do not run on Kubernetes, where pods come "
            "and go; build them into the image and leave setup out"
        )
    return {
        "rayVersion": ray_version,
        "authOptions": {"mode": shape.auth},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": round(60 * shape.idle_minutes)},
        "headGroupSpec": {
            # The head drives: it offers no CPUs to runs.
            "rayStartParams": {"num-cpus": "0"},
            "serviceType": "ClusterIP",
            "template": _pod(shape, shape.head),
        },
        "workerGroupSpecs": [
            {
                "groupName": worker.name,
                "replicas": worker.min_workers,
                "minReplicas": worker.min_workers,
                "maxReplicas": worker.max_workers,
                "rayStartParams": {},
                "template": _pod(shape, worker),
            }
            for worker in shape.workers
        ],
    }


def _pod(shape: Shape, node: NodeType) -> dict[str, Any]:
    amounts: dict[str, str] = {"cpu": str(node.cpus)}
    amounts |= {"memory": f"{node.memory_gib}Gi"} if node.memory_gib else {}
    amounts |= {"nvidia.com/gpu": str(node.gpus)} if node.gpus else {}
    values = {k: v for k, v in shape.environment().items() if k != "RAY_AUTH_MODE"}
    container: dict[str, Any] = {
        "name": "ray",
        "image": shape.image,
        "env": [{"name": name, "value": value} for name, value in values.items()],
        "resources": {"limits": amounts, "requests": dict(amounts)},
    }
    if shape.secret_name:
        container["envFrom"] = [{"secretRef": {"name": shape.secret_name}}]
    spec: dict[str, Any] = {"containers": [container], "terminationGracePeriodSeconds": 60}
    return {"spec": {**spec, **node.node_config}}
