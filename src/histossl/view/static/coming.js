// Requests for tiles. A request whose tile leaves the screen is cancelled, and sent again if the tile comes back into
// view. OpenSeadragon itself waits for every tile that it once requested.
export class Coming {
  jobs = new Map(); // job of OpenSeadragon -> its AbortController, null while its tile is off the screen
  // The two methods that OpenSeadragon calls to fetch tiles.
  fetching() {
    return {
      downloadTileStart: (job) => this.ask(job),
      downloadTileAbort: (job) => { this.jobs.get(job)?.abort(); this.jobs.delete(job); },
    };
  }
  async ask(job) {
    const stop = new AbortController();
    this.jobs.set(job, stop);
    try {
      const answer = await fetch(job.src, { signal: stop.signal });
      if (!answer.ok) throw new Error(`error ${answer.status}`);
      const picture = await answer.blob();
      this.jobs.delete(job);
      job.finish(picture, null, "rasterBlob");
    } catch (error) {
      if (stop.signal.aborted) return;
      this.jobs.delete(job);
      job.fail(error.message, null);
    }
  }
  // The navigator always shows the whole slide.
  look(viewer) {
    const seen = viewer.viewport.getBounds(true);
    for (const [job, stop] of this.jobs) {
      const { bounds, tiledImage } = job.tile;
      const here = tiledImage.viewer !== viewer || (bounds.x < seen.x + seen.width && bounds.y < seen.y + seen.height
        && bounds.x + bounds.width > seen.x && bounds.y + bounds.height > seen.y);
      if (here && !stop) this.ask(job);
      else if (!here && stop) { stop.abort(); this.jobs.set(job, null); }
    }
  }
}
